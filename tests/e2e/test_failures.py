"""What dies, who notices, and that nothing is left behind, where nothing is started again."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from e2e.serving import Served, serving, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.model]

ASK = {
    "model": "smollm2-135m",
    "messages": [{"role": "user", "content": "Tell me a long story about a lighthouse."}],
    "temperature": 0,
}


FOR_GOOD = "--no-restart-lost"


def post(served: Served, **more: object) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/chat/completions", json=ASK | more, timeout=60)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pids_of(served: Served) -> list[int]:
    return [entry["pid"] for entry in served.instances().values()]


def shared_memory() -> set[str]:
    """Shared-memory names in the file system; MemServe must never add one."""
    return set(os.listdir("/dev/shm"))


def test_ctrl_c_stops_everything_and_leaves_nothing() -> None:
    before = shared_memory()
    with serving() as served:
        pids = pids_of(served)
        assert served.stop(signal.SIGINT) == 0
        assert not any(map(alive, pids))
        assert shared_memory() == before


def test_ctrl_c_in_the_middle_of_requests_gives_every_block_back() -> None:
    with serving() as served, ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(post, served, max_tokens=2000) for _ in range(4)]
        wait_for(lambda: any(entry["running"] for entry in served.instances().values()), "nothing runs")
        pids = pids_of(served)
        assert served.stop(signal.SIGINT) == 0
        assert not any(map(alive, pids))
        for each in asking:
            error = each.exception(30)
            assert error is not None or each.result().status_code >= 500


def test_kill_9_of_the_server_ends_the_instances() -> None:
    before = shared_memory()
    with serving() as served:
        pids = pids_of(served)
        served.process.kill()
        served.process.wait(10)
        wait_for(lambda: not any(map(alive, pids)), "instances outlive their server", seconds=10)
        assert shared_memory() == before


def test_kill_9_of_the_only_decode_instance_is_told_and_refused() -> None:
    with serving(FOR_GOOD) as served:
        os.kill(served.instances()["decode-0"]["pid"], signal.SIGKILL)
        wait_for(lambda: health(served)["status"] == "unavailable", "the death was not noticed")
        assert "decode" in health(served)["message"]
        assert health(served)["lost"][0]["instance"] == "decode-0"
        answer = post(served, max_tokens=5)
        assert answer.status_code == 503
        assert "decode" in answer.json()["error"]["message"]
        assert "retry-after" in answer.headers
        assert served.stop() == 0


def test_the_remaining_instances_go_on() -> None:
    with serving("--prefill", "1", "--decode", "2", "--threads", "1", FOR_GOOD) as served:
        expected = post(served, max_tokens=12).json()["choices"][0]["message"]["content"]
        os.kill(served.instances()["decode-0"]["pid"], signal.SIGKILL)
        wait_for(lambda: health(served)["status"] == "degraded", "the death was not noticed")
        answer = post(served, max_tokens=12)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"] == expected


def test_the_last_of_its_kind_that_dies_while_streaming_ends_the_stream_with_an_error() -> None:
    with serving(FOR_GOOD) as served:
        pid = served.instances()["decode-0"]["pid"]
        lines = []
        url = f"{served.url}/v1/chat/completions"
        body = ASK | {"max_tokens": 800, "stream": True}
        with httpx.stream("POST", url, json=body, timeout=60) as stream:
            for line in stream.iter_lines():
                lines.append(line)
                if len(lines) == 10:
                    os.kill(pid, signal.SIGKILL)
        assert any('"error"' in line and "decode-0 was lost" in line for line in lines)
        prefill = served.instances()["prefill-0"]
        assert prefill["blocks"]["active"] == 0


def test_a_frozen_instance_is_noticed_by_its_silence() -> None:
    with serving(FOR_GOOD) as served:
        pid = served.instances()["decode-0"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: health(served)["status"] == "unavailable", "the silence was not noticed")
        assert "no heartbeat" in health(served)["lost"][0]["reason"]
        wait_for(lambda: not alive(pid), "a frozen instance was not killed")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_everything(*, stream: bool) -> None:
    with serving() as served:
        body = ASK | {"max_tokens": 1500, "stream": stream}
        with httpx.Client(timeout=httpx.Timeout(30, read=0.3 if not stream else 30)) as client:
            if stream:
                with client.stream("POST", f"{served.url}/v1/chat/completions", json=body) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{served.url}/v1/chat/completions", json=body)
        started = time.monotonic()
        served.wait_idle()
        assert time.monotonic() - started < 30
        assert post(served, max_tokens=3).status_code == 200


def test_an_instance_that_cannot_start_is_explained() -> None:
    with pytest.raises(AssertionError) as failed, serving("--kv-memory", "900TiB"):
        pass
    assert "ended before it was ready" in str(failed.value)
    assert "pool.memory" in str(failed.value)


def health(served: Served) -> dict[str, object]:
    answer = httpx.get(f"{served.url}/health", timeout=10)
    assert answer.status_code in (200, 503)
    return dict(answer.json())
