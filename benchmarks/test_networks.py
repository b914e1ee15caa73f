"""Generators, U-Net blocks and frozen backbones against their peers."""


def test_network(network_case, run_case):
    run_case(network_case)
