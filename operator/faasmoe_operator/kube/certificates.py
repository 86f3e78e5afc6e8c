"""Certificates of the operator's own authority, for TLS between pods. Pure: time is an argument.

Keys and certificates follow from the root key and the date alone, so that nothing needs to be saved
and every replica of the operator issues the same. An authority is new each year and valid a year
before and after; all three that are valid are trusted, so one is known everywhere a year before it
signs. Certificates are new each month and valid for two months more than they are used, which is
how long the operator may be away.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY_S = 86_400
AUTHORITY_PERIOD_S = 365 * DAY_S
CERTIFICATE_PERIOD_S = 30 * DAY_S
CERTIFICATE_SPARE_PERIODS = 2
CLOCK_SKEW_S = DAY_S
_CURVE = ec.SECP256R1()
_CURVE_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """A certificate, its key, and the authorities that its owner trusts; all in PEM.

    Attributes:
        certificate: the certificate.
        key: its private key.
        authorities: the authorities.
    """

    certificate: bytes
    key: bytes = field(repr=False)
    authorities: bytes


def issue_certificate(
    root_key: bytes, owner: str, names: Sequence[str], now_s: float
) -> IssuedCertificate:
    """Return the certificate that is due now.

    Args:
        root_key: the operator's root key.
        owner: whose it is, such as a namespace; each owner has keys of its own.
        names: its DNS names.
        now_s: Unix time, in seconds.
    """
    month, year = int(now_s // CERTIFICATE_PERIOD_S), int(now_s // AUTHORITY_PERIOD_S)
    return _issue(root_key, owner, tuple(names), month, year)


@lru_cache(maxsize=1024)
def _issue(
    root_key: bytes, owner: str, names: tuple[str, ...], month: int, year: int
) -> IssuedCertificate:
    purpose = f"tls-certificate:{owner}:{','.join(names)}:{month}:{year}"
    key, issuer = _derive_key(root_key, purpose), _authority_key(root_key, year)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_common_name(names[0]))
        .issuer_name(_authority_name(year))
        .public_key(key.public_key())
        .serial_number(_derive_serial(root_key, purpose))
        .not_valid_before(_date(month * CERTIFICATE_PERIOD_S - CLOCK_SKEW_S))
        .not_valid_after(_date((month + 1 + CERTIFICATE_SPARE_PERIODS) * CERTIFICATE_PERIOD_S))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_authority=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False
        )
        .sign(issuer, hashes.SHA256(), ecdsa_deterministic=True)
    )
    authorities = b"".join(_authority(root_key, y) for y in (year - 1, year, year + 1))
    return IssuedCertificate(_to_pem(certificate), _key_pem(key), authorities)


@lru_cache(maxsize=8)
def _authority(root_key: bytes, year: int) -> bytes:
    key, name = _authority_key(root_key, year), _authority_name(year)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(_derive_serial(root_key, f"tls-authority:{year}"))
        .not_valid_before(_date((year - 1) * AUTHORITY_PERIOD_S - CLOCK_SKEW_S))
        .not_valid_after(_date((year + 2) * AUTHORITY_PERIOD_S))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    )
    return _to_pem(certificate)


def _authority_key(root_key: bytes, year: int) -> ec.EllipticCurvePrivateKey:
    return _derive_key(root_key, f"tls-authority:{year}")


def _authority_name(year: int) -> x509.Name:
    return _common_name(f"FaaSMoE operator, from {_date(year * AUTHORITY_PERIOD_S):%Y-%m-%d}")


def _derive_key(root_key: bytes, purpose: str) -> ec.EllipticCurvePrivateKey:
    # 384 bits, so that the remainder favours no key.
    digest = hmac.new(root_key, purpose.encode(), hashlib.sha384).digest()
    return ec.derive_private_key(int.from_bytes(digest) % (_CURVE_ORDER - 1) + 1, _CURVE)


def _derive_serial(root_key: bytes, purpose: str) -> int:
    digest = hmac.new(root_key, f"{purpose}:serial".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:16]) | 1  # never 0


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _common_name(text: str) -> x509.Name:
    # At most 64 characters; who verifies looks at the alternative names.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _date(time_s: float) -> datetime:
    return datetime.fromtimestamp(time_s, UTC)


def _to_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
