"""The command line of sharefold: one file a verb, loaded when the verb is run."""
