"""A run in virtual time: the real loop, fleet and ledger on modelled engines, learners and networks."""
