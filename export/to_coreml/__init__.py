"""The target `coreml`, and an interpreter of its programs where no Mac is."""
