COMMENT ON TABLE innerloop.item_statistics IS 'Per partition: how often which item is taken first, second, …, decayed; moves at every 128th offset.';
