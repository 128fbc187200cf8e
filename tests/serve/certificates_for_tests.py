"""Chains of certificates made by the library `cryptography`, right ones and those with one thing wrong."""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

CLAIM_SIGNING = ObjectIdentifier("1.3.6.1.4.1.62558.2.1")
DOCUMENT_SIGNING = ObjectIdentifier("1.3.6.1.5.5.7.3.36")
USAGES = (
    "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
    "key_cert_sign crl_sign encipher_only decipher_only"
)


@dataclass
class Made:
    """Files of a chain in a folder, and its key."""

    chain: Path
    key: Path
    anchors: Path
    private: Any


def name(text: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example Studio"),
            x509.NameAttribute(NameOID.COMMON_NAME, text),
        ]
    )


def issue(
    subject: str,
    key: Any,
    issuer: str,
    issuer_key: Any,
    *,
    authority: bool = False,
    usage: Any = ExtendedKeyUsageOID.EMAIL_PROTECTION,
    days: tuple[int, int] = (-1, 30),
    known_issuer: bool = True,
    signs: bool = True,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    wanted = (
        {"key_cert_sign", "crl_sign"}
        if authority
        else {"digital_signature"}
        if signs
        else {"key_agreement"}
    )
    builder = (
        x509.CertificateBuilder(name(issuer), name(subject), key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(authority, None), True)
        .add_extension(x509.KeyUsage(**{each: each in wanted for each in USAGES.split()}), True)
    )
    if known_issuer:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
        builder = builder.add_extension(identifier, False)
    if not authority and usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
    return builder.sign(
        issuer_key, SHA256() if isinstance(issuer_key, ec.EllipticCurvePrivateKey) else None
    )


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


def new_key() -> Any:
    return ec.generate_private_key(ec.SECP256R1())


def make(folder: Path, key: Any = None, **wrong: Any) -> Made:
    """Root, intermediate and signer; `wrong` goes to the signer's certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    root, middle, signer = new_key(), new_key(), key or new_key()
    anchor = issue("root", root, "root", root, authority=True)
    intermediate = issue("intermediate", middle, "root", root, authority=True)
    leaf = issue("signer", signer, "intermediate", middle, **wrong)
    made = Made(folder / "chain.pem", folder / "key.pem", folder / "anchors.pem", signer)
    made.chain.write_bytes(pem(leaf, intermediate))
    made.anchors.write_bytes(pem(anchor))
    made.key.write_bytes(private_pem(signer))
    return made


def private_pem(
    key: Any, kind: PrivateFormat = PrivateFormat.PKCS8, password: bytes = b""
) -> bytes:
    secrecy = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, kind, secrecy)
