"""Files that training reads: mosaicml-streaming shards and object stores."""
