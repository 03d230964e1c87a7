"""The ledger of what has been judged: see tools/judge.py."""
