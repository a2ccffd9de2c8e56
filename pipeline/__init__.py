"""Everything that runs: settings, feeding, streaming, storing, reading."""
