"""The version of Fokker: of the package, of `--version`, and of what a run folder was made with."""

VERSION = "0.1.0"
