"""Machines on which commands run: this one, a host behind ssh, a phone."""
