"""Where latency is measured: computers, Android devices, iPhones."""
