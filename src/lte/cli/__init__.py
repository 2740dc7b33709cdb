"""The subcommands of `lte`, a module each; `lte_cli` lists them and imports the one that is called."""
