"""Every operator against its peers."""


def test_operator(operator_case, run_case):
    run_case(operator_case)
