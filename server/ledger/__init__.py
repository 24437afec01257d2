"""The ledger: keys, balances and requests in a database, each verb one transaction."""
