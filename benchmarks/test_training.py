"""Training steps against their peers."""


def test_training(training_case, run_case):
    run_case(training_case)
