"""Which addresses jobs may reach through their node."""

import pytest

from bacalhau.transfer.addresses import AddressPolicy, AddressRefusedError, AllowedAddress


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1",
        "169.254.169.254", "169.254.0.1", "168.63.129.16", "100.100.100.200", "192.0.0.192",
        "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1",
        "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "64:ff9b::a9fe:a9fe",
    ],
)  # fmt: skip
def test_what_is_not_public_is_refused(address: str) -> None:
    with pytest.raises(AddressRefusedError, match="--allow-address"):
        AddressPolicy().check("host.example", address, 80)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07::1", "64:ff9b::808:808"])
def test_public_addresses_are_fine(address: str) -> None:
    assert AddressPolicy().refusal(address, 443) == ""


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "192.168.1.1", "fd12::1", "::1"])
def test_private_addresses_when_allowed(address: str) -> None:
    assert AddressPolicy(allow_private=True).refusal(address, 80) == ""


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "168.63.129.16", "fd00:ec2::254", "::ffff:169.254.169.254"]
)
def test_metadata_stays_closed_when_private_addresses_are_open(address: str) -> None:
    assert "metadata" in AddressPolicy(allow_private=True).refusal(address, 80)
    exact = AddressPolicy([AllowedAddress.parse("169.254.169.254:80")])
    assert exact.refusal("169.254.169.254", 80) == ""
    assert exact.refusal("169.254.169.254", 81)


@pytest.mark.parametrize(
    ("text", "address", "port", "covers"),
    [
        ("10.0.0.0/8", "10.9.9.9", 1, True),
        ("10.0.0.0/8", "192.168.0.1", 1, False),
        ("127.0.0.1:9000", "127.0.0.1", 9000, True),
        ("127.0.0.1:9000", "127.0.0.1", 9001, False),
        ("::1", "::1", 5, True),
        ("[::1]:80", "::1", 80, True),
        ("[fd00::/8]:80", "fd99::1", 81, False),
        ("127.0.0.0/8", "::ffff:127.0.0.1", 1, True),
    ],
)
def test_exceptions(text: str, address: str, port: int, covers: bool) -> None:
    policy = AddressPolicy([AllowedAddress.parse(text)])
    assert (policy.refusal(address, port) == "") is covers
    assert AllowedAddress.parse(str(AllowedAddress.parse(text))) == AllowedAddress.parse(text)


@pytest.mark.parametrize(
    "text", ["", "host", "10.0.0.0/33", "1.2.3.4:0", "1.2.3.4:70000", "[::1", "1.2.3.4:x"]
)
def test_what_is_no_exception(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        AllowedAddress.parse(text)
