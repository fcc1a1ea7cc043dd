"""What names, keys, paths and addresses may look like."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_api import names

Check = Callable[[str], str]


@pytest.mark.parametrize(
    ("check", "given_value", "canonical"),
    [
        (names.check_path, "/a//b/./c/", "/a/b/c"),
        (names.check_path, "//a", "/a"),
        (names.check_path, "/.hidden", "/.hidden"),
        (names.check_path, "/", "/"),
        (names.check_path, "/a..b/...", "/a..b/..."),
        (names.check_domain, " Example.ORG ", "example.org"),
        (names.check_domain, "*.example.org", "*.example.org"),
        (names.check_domain, ".example.org", ".example.org"),
        (names.check_domain, "10.0.0.1", "10.0.0.1"),
        (names.check_domain, "::1", "::1"),
        (names.check_env_name, "PATH_2", "PATH_2"),
        (names.check_env_value, "env:HOME", "env:HOME"),
        (names.check_env_value, "file:x y", "file:x y"),
        (names.check_label_key, "example.org/zone", "example.org/zone"),
        (names.check_label_value, "two words, é", "two words, é"),
        (names.check_result_name, "outputs", "outputs"),
        (names.check_port_name, "http_2", "http_2"),
        (names.check_type_name, "s3-managed.v2", "s3-managed.v2"),
    ],
)
def test_good_values_come_back_in_their_normal_form(
    check: Check, given_value: str, canonical: str
) -> None:
    assert check(given_value) == canonical
    assert check(canonical) == canonical


@pytest.mark.parametrize(
    ("check", "value", "says"),
    [
        (names.check_path, "a", "absolute"),
        (names.check_path, "", "absolute"),
        (names.check_path, "~/a", "absolute"),
        (names.check_path, "C:\\a", "absolute"),
        (names.check_path, "/a/../b", r"'\.\.'"),
        (names.check_path, "/..", r"'\.\.'"),
        (names.check_path, "/a\nb", "control"),
        (names.check_path, "/a\0", "NUL"),
        (names.check_path, "/\ud800", "surrogate"),
        (names.check_path, "/" + "a" * 5000, "4096"),
        (names.check_mount_path, "//./", "root"),
        (names.check_env_name, "path", "upper-case"),
        (names.check_env_name, "_A", "upper-case"),
        (names.check_env_name, "1A", "upper-case"),
        (names.check_env_name, "A-B", "upper-case"),
        (names.check_env_name, "", "upper-case"),
        (names.check_env_name, "É", "upper-case"),
        (names.check_env_name, "BACALHAU_JOB_ID", "set by the system"),
        (names.check_env_name, "bacalhau_x", "set by the system"),
        (names.check_env_name, "A" * 257, "256"),
        (names.check_env_value, "env:", "must follow"),
        (names.check_env_value, "env:A B", "must follow"),
        (names.check_env_value, "a\0b", "NUL"),
        (names.check_env_value, "x" * 100_000, "65536"),
        (names.check_label_key, "", "empty"),
        (names.check_label_key, "a b", "spaces"),
        (names.check_label_key, "a=b", "spaces"),
        (names.check_label_key, "a\x07", "spaces"),
        (names.check_label_key, "a" * 254, "253"),
        (names.check_label_value, "a\nb", "control"),
        (names.check_label_value, "\x9b31m", "control"),
        (names.check_label_value, "x" * 257, "use an annotation"),
        (names.check_long_text, "\x1b[31m", "control"),
        (names.check_long_text, "x" * 65537, "65536"),
        (names.check_port_name, "1a", "begins with no digit"),
        (names.check_port_name, "a" * 238, "237"),
        (names.check_type_name, "", "must be a name"),
        (names.check_type_name, "a/b", "must be a name"),
        (names.check_type_name, "a" * 64, "must be a name"),
        (names.check_ip, "localhost", "IP address"),
        (names.check_ip, "1.2.3", "IP address"),
        (names.check_domain, "localhost", "domain name"),
        (names.check_domain, "a_b..org", "domain name"),
        (names.check_domain, "http://a.org", "domain name"),
        (names.check_domain, "a.org/x", "domain name"),
        (names.check_domain, "*.*.org", "domain name"),
        (names.check_domain, "-a.org", "domain name"),
        (names.check_domain, "a" * 64 + ".org", "domain name"),
        (names.check_domain, "a." * 200, "253"),
    ],
)
def test_bad_values_are_refused(check: Check, value: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check(value)


TRAVERSALS = sorted(
    {
        f"{start}{dots}{end}"
        for start in (
            "",
            "/",
            "a/",
            "./",
            "\\",
            "%2e",
            "a\\",
            "//",
            ".",
            "~",
            "\n",
            "\0",
            " ",
            "a/./",
        )
        for dots in (
            "..",
            "../..",
            "..\\..",
            "..%2f",
            "%2e%2e/",
            "..\u2215",
            "\u2024\u2024",
            "\uff0e\uff0e",
        )
        for end in ("", "/", "/x", "\\", " ", "\0", ".")
    }
)


def test_a_result_name_is_one_path_segment() -> None:
    assert len(TRAVERSALS) >= 200
    accepted = []
    for name in (*TRAVERSALS, "a/b", "/", ".", "..", "", "a\\b", "a:b", "-rf", ".hidden", "stdout", "STDERR",
                 "exitCode", "a\n", "a" * 64, "é"):  # fmt: skip
        try:
            accepted.append(names.check_result_name(name))
        except ValueError:
            continue
    assert accepted == []


@given(st.text())
def test_checks_return_or_raise_value_errors(value: str) -> None:
    for check in (names.check_path, names.check_domain, names.check_env_name, names.check_env_value,
                  names.check_label_key, names.check_result_name, names.check_ip):  # fmt: skip
        try:
            canonical = check(value)
        except ValueError:
            continue
        assert check(canonical) == canonical
