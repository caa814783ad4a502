"""Who does what when: threads, journal, going on after an interruption."""
