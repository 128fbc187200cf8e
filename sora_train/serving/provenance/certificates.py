"""The certificate chain and key that sign videos: read from PEM files, checked at start, or made for development.

C2PA asks more of a chain than TLS does, and its library says "the certificate is invalid" to most of it. Here each
fault has a sentence of its own, told before the first video is made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_train.base.files import folder_when_whole
from sora_train.errors import UserError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

USAGES = {
    "1.3.6.1.5.5.7.3.4": "emailProtection",
    "1.3.6.1.5.5.7.3.36": "documentSigning",
    "1.3.6.1.4.1.62558.2.1": "c2pa-kp-claimSigning",
}
"""Extended key usages of which a signing certificate has one: C2PA's own, and those that it takes besides."""

_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_DEV_YEARS = 10
_KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)
_MIN_RSA_BITS = 2048


@dataclass(frozen=True)
class Chain:
    """The certificates that go into every manifest, the signer's first."""

    pem: str
    algorithm: str
    """C2PA's name of how the first one's key signs: es256, es384, es512, ed25519 or ps256."""


def read_chain(path: Path, now: datetime | None = None) -> Chain:
    """The chain of a PEM file, found fit for signing at `now`.

    Raises:
        UserError: it is missing or no PEM, the signer stands alone, the order is wrong, a certificate is out of date,
            or the signer's lacks an extension that C2PA asks for.
    """
    from cryptography.x509 import load_pem_x509_certificates

    data = _read(path, "the certificate")
    try:
        chain = load_pem_x509_certificates(data)
    except ValueError:
        raise UserError(
            f"{path} holds no certificate in PEM; give the signer's and its intermediates, each from "
            "-----BEGIN CERTIFICATE----- on"
        ) from None
    if len(chain) < 2:
        raise UserError(
            f"{path} holds one certificate alone, which no reader could ever trust; add the intermediates that "
            "issued it below it"
        )
    _check_dates(path, chain, now or datetime.now(UTC))
    _check_order(path, chain)
    _check_extensions(path, chain[0])
    return Chain(data.decode(), _algorithm(path, chain[0]))


def read_key(path: Path, chain: Chain) -> bytes:
    """The PKCS#8 private key of a PEM file, found to be that of the chain's first certificate.

    Raises:
        UserError: it is missing, no PEM, encrypted, in another form than PKCS#8, or another certificate's.
    """
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_private_key,
    )
    from cryptography.x509 import load_pem_x509_certificate

    data = _read(path, "the private key")
    label = re.search(rb"-----BEGIN ([A-Z0-9 ]*)-----", data)
    kind = label[1].decode() if label else ""
    if kind == "ENCRYPTED PRIVATE KEY" or b"Proc-Type: 4,ENCRYPTED" in data:
        raise UserError(
            f"{path} is encrypted, and a server has nobody to ask for its password; decrypt it with "
            f"`openssl pkcs8 -in {path} -out key.pem`, or sign by a KMS callback"
        )
    if kind in ("EC PRIVATE KEY", "EC PARAMETERS", "RSA PRIVATE KEY"):
        raise UserError(
            f"{path} is a key of the older kind '{kind}', and C2PA takes PKCS#8; convert it with "
            f"`openssl pkcs8 -topk8 -nocrypt -in {path} -out key.pem`"
        )
    try:
        key = load_pem_private_key(data, None) if kind == "PRIVATE KEY" else None
    except (ValueError, TypeError):
        key = None
    if key is None:
        raise UserError(
            f"{path} holds no private key in PEM; give one from -----BEGIN PRIVATE KEY----- on"
        )

    def written(public: Any) -> bytes:
        return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    certificate = load_pem_x509_certificate(chain.pem.encode())
    if written(key.public_key()) != written(certificate.public_key()):
        raise UserError(
            f"{path} is not the key of the certificate of '{_name(certificate)}'; give the key with which that one "
            "was asked for"
        )
    return data


def read_anchors(path: Path) -> str:
    """The trusted roots of a PEM file. Raises UserError where it is missing or holds none."""
    from cryptography.x509 import load_pem_x509_certificates

    data = _read(path, "the file of trusted roots")
    try:
        load_pem_x509_certificates(data)
    except ValueError:
        raise UserError(f"{path} holds no certificate in PEM; give the roots to trust") from None
    return data.decode()


@dataclass(frozen=True)
class DevFiles:
    """A chain for development on the disk; nobody trusts it but who is given `anchors`."""

    folder: Path

    @property
    def chain(self) -> Path:
        return self.folder / "chain.pem"

    @property
    def key(self) -> Path:
        return self.folder / "key.pem"

    @property
    def anchors(self) -> Path:
        return self.folder / "anchors.pem"


def dev_files(folder: Path) -> DevFiles:
    """The development chain of `folder`, made there if it has none; whoever comes second takes the first one's."""
    files = DevFiles(folder)
    if not files.chain.exists():
        try:
            with folder_when_whole(folder) as partial:
                _make_dev_files(DevFiles(partial))
        except OSError:
            if not files.chain.exists():
                raise
    return files


def _make_dev_files(files: DevFiles) -> None:
    """Root, intermediate and signer. Only the signer's key is kept, so the root can issue nothing else."""
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    root, intermediate, signer = (generate_private_key(SECP256R1()) for _ in range(3))
    anchor = _issue("root", root, "root", root, authority=True)
    middle = _issue("intermediate", intermediate, "root", root, authority=True)
    leaf = _issue("signer", signer, "intermediate", intermediate, authority=False)
    secret = signer.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with open(os.open(files.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
    files.chain.write_bytes(b"".join(each.public_bytes(Encoding.PEM) for each in (leaf, middle)))
    files.anchors.write_bytes(anchor.public_bytes(Encoding.PEM))


def _issue(subject: str, key: Any, issuer: str, issuer_key: Any, *, authority: bool) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(common: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "sora_train development"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"development {common}"),
            ]
        )

    now = datetime.now(UTC)
    wanted = {"key_cert_sign", "crl_sign"} if authority else {"digital_signature"}
    builder = (
        x509.CertificateBuilder(name(issuer), name(subject), key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=365 * _DEV_YEARS))
        .add_extension(x509.BasicConstraints(authority, None), True)
        .add_extension(x509.KeyUsage(**{usage: usage in wanted for usage in _KEY_USAGES}), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
        )
    )
    if not authority:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(usage, False)
    return builder.sign(issuer_key, SHA256())


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}; check its path") from None


def _name(certificate: Certificate) -> str:
    return certificate.subject.rfc4514_string()


def _check_dates(path: Path, chain: Sequence[Certificate], now: datetime) -> None:
    for certificate in chain:
        if now >= certificate.not_valid_after_utc:
            raise UserError(
                f"{path}: the certificate of '{_name(certificate)}' expired on "
                f"{certificate.not_valid_after_utc:%Y-%m-%d}; renew it"
            )
        if now < certificate.not_valid_before_utc:
            raise UserError(
                f"{path}: the certificate of '{_name(certificate)}' is valid from "
                f"{certificate.not_valid_before_utc:%Y-%m-%d} on; check this machine's clock"
            )


def _check_order(path: Path, chain: Sequence[Certificate]) -> None:
    from cryptography.exceptions import InvalidSignature

    for certificate, issuer in zip(chain, chain[1:], strict=False):
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            raise UserError(
                f"{path}: the certificate of '{_name(certificate)}' was not issued by the next one, of "
                f"'{_name(issuer)}'; put the signer's first and each one's issuer below it"
            ) from None


def _check_extensions(path: Path, signer: Certificate) -> None:
    from cryptography import x509

    def extension(kind: Any) -> Any:
        try:
            return signer.extensions.get_extension_for_class(kind).value
        except x509.ExtensionNotFound:
            return None

    def refuse(fault: str) -> UserError:
        return UserError(
            f"{path}: the certificate of '{_name(signer)}' {fault}; ask for one that can sign for C2PA"
        )

    constraints, usage = extension(x509.BasicConstraints), extension(x509.KeyUsage)
    extended = extension(x509.ExtendedKeyUsage)
    if constraints is not None and constraints.ca:
        raise refuse("is an authority's, which signs certificates and no videos")
    if usage is None or not usage.digital_signature:
        raise refuse("lacks the key usage digitalSignature")
    if not {each.dotted_string for each in extended or ()} & set(USAGES):
        raise refuse(f"lacks an extended key usage of {', '.join(USAGES.values())}")
    if extension(x509.AuthorityKeyIdentifier) is None:
        raise refuse("lacks the extension authorityKeyIdentifier")


def _algorithm(path: Path, signer: Certificate) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    key = signer.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _MIN_RSA_BITS:
        return "ps256"
    raise UserError(
        f"{path}: C2PA signs with keys on P-256, P-384 or P-521, with Ed25519 or with RSA of at least "
        f"{_MIN_RSA_BITS} bits; '{_name(signer)}' has none of them"
    )
