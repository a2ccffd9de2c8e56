-- Revision 0011: `innerloop explain` computes a list again from what it was made of, with a reader's login.
GRANT SELECT ON innerloop.item_statistics, innerloop.pair_snapshots, innerloop.pair_log TO innerloop_reader;
