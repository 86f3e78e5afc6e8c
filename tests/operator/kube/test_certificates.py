"""Which certificate is due when, and that it is known wherever an older or newer one is."""

import ssl
from datetime import UTC, datetime

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from faasmoe_operator.kube.certificates import (
    AUTHORITY_PERIOD_S,
    CERTIFICATE_PERIOD_S,
    CERTIFICATE_SPARE_PERIODS,
    DAY_S,
    IssuedCertificate,
    issue_certificate,
)

ROOT_KEY = b"k" * 32
NAMES = ["llm.models.faasmoe.internal"]
NOW_S = datetime(2026, 11, 30, tzinfo=UTC).timestamp()
YEAR_END_S = (NOW_S // AUTHORITY_PERIOD_S + 1) * AUTHORITY_PERIOD_S
times = st.floats(0, 3 * AUTHORITY_PERIOD_S).map(lambda offset_s: NOW_S + offset_s)


def issue(
    now_s: float = NOW_S, *, root_key: bytes = ROOT_KEY, owner: str = "a"
) -> IssuedCertificate:
    return issue_certificate(root_key, owner, NAMES, now_s)


def parse(issued: IssuedCertificate) -> tuple[x509.Certificate, list[x509.Certificate]]:
    certificate = x509.load_pem_x509_certificate(issued.certificate)
    return certificate, x509.load_pem_x509_certificates(issued.authorities)


def is_trusted(certificate: x509.Certificate, authorities: list[x509.Certificate]) -> bool:
    """Return whether one of the authorities has signed a certificate."""
    for authority in authorities:
        if authority.subject == certificate.issuer:
            certificate.verify_directly_issued_by(authority)
            return True
    return False


def test_every_operator_issues_the_same() -> None:
    assert issue() == issue(NOW_S + 1)
    assert (
        issue().certificate
        == issue_certificate(bytes(ROOT_KEY), "a", tuple(NAMES), NOW_S).certificate
    )


def test_each_owner_and_each_root_key_has_keys_of_its_own() -> None:
    keys = {issue().key, issue(owner="b").key, issue(root_key=b"l" * 32).key}
    assert len(keys) == 3


def test_openssl_takes_key_and_certificate(tmp_path: pytest.TempPathFactory) -> None:
    issued = issue()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    path = tmp_path / "both.pem"  # type: ignore[operator]
    path.write_bytes(issued.certificate + issued.key)
    context.load_cert_chain(path)
    context.load_verify_locations(cadata=issued.authorities.decode())
    assert len(context.get_ca_certs()) == 3


def test_a_certificate_is_replaced_each_month_and_outlives_it() -> None:
    first, _ = parse(issue())
    later, _ = parse(issue(NOW_S + CERTIFICATE_PERIOD_S))
    assert first.serial_number != later.serial_number
    spare_s = (first.not_valid_after_utc - later.not_valid_before_utc).total_seconds()
    assert spare_s >= CERTIFICATE_SPARE_PERIODS * CERTIFICATE_PERIOD_S


@given(times)
@settings(max_examples=30, deadline=None)
def test_what_is_due_is_valid_and_signed_by_a_trusted_authority(now_s: float) -> None:
    certificate, authorities = parse(issue(now_s))
    now = datetime.fromtimestamp(now_s, UTC)
    for one in (certificate, *authorities):
        assert one.not_valid_before_utc < now < one.not_valid_after_utc
    assert is_trusted(certificate, authorities)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == NAMES


@given(times, st.floats(0, CERTIFICATE_SPARE_PERIODS * CERTIFICATE_PERIOD_S))
@settings(max_examples=30, deadline=None)
def test_pods_that_got_their_files_at_other_times_know_each_other(
    now_s: float, age_s: float
) -> None:
    """As while a rotation reaches one pod after the other, or the operator is away."""
    new, new_authorities = parse(issue(now_s))
    old, old_authorities = parse(issue(now_s - age_s))
    now = datetime.fromtimestamp(now_s, UTC)
    assert is_trusted(new, old_authorities)
    assert is_trusted(old, new_authorities)
    assert old.not_valid_after_utc > now
    signers = [a for a in old_authorities if a.subject == new.issuer]
    assert all(a.not_valid_before_utc < now < a.not_valid_after_utc for a in signers)


def test_a_new_authority_was_trusted_before_it_signs() -> None:
    before, after = parse(issue(YEAR_END_S - DAY_S)), parse(issue(YEAR_END_S + DAY_S))
    assert before[0].issuer != after[0].issuer
    assert is_trusted(after[0], before[1])
    assert is_trusted(before[0], after[1])
