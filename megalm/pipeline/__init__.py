"""Pipeline parallelism: schedules as data, their simulation and pictures, and the executor that runs them."""
