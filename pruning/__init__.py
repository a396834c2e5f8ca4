"""Which layers can go, what each is worth, which to drop, and dropping them (paper, section 3)."""
