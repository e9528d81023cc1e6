"""Words everybody uses: types, messages, config, errors, clock, radix tree. No I/O."""
