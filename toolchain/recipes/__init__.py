"""Settings of the known models, as TOML."""
