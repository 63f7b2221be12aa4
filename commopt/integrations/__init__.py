"""Where a method is plugged in; the only files that know a framework."""
