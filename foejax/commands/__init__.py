"""The commands of `foejax`, one file a family; `parser.py` says what they take."""
