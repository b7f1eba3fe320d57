"""Do the math before a job starts: shapes, FLOPs, memory, time, money, failures, layouts."""
