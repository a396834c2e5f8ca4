"""Where commands run and files lie: this machine, one behind ssh, a phone."""
