"""What keeps a certificate from signing is told at start, in a sentence; chains made by `cryptography`."""

import stat
from collections.abc import Callable
from pathlib import Path

import certificates_for_tests as chains
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from sentences import refuses

from sora_train.errors import UserError
from sora_train.serving.provenance.signing import open_signer


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        (lambda: None, {}),
        (lambda: ec.generate_private_key(ec.SECP384R1()), {}),
        (ed25519.Ed25519PrivateKey.generate, {}),
        (lambda: rsa.generate_private_key(65537, 2048), {}),
        (lambda: None, {"usage": chains.CLAIM_SIGNING}),
        (lambda: None, {"usage": chains.DOCUMENT_SIGNING}),
    ],
    ids=["p256", "p384", "ed25519", "rsa", "claim signing", "document signing"],
)
def test_every_kind_of_certificate_that_c2pa_takes_signs(
    tmp_path: Path, key: Callable, wrong: dict
) -> None:
    made = chains.make(tmp_path, key(), **wrong)
    open_signer(certificate=made.chain, key=made.key)


@pytest.mark.parametrize(
    ("wrong", "facts"),
    [
        ({"days": (-9, -2)}, ("signer", "expired", "renew")),
        ({"days": (2, 9)}, ("valid from", "clock")),
        ({"usage": None}, ("signer", "emailProtection", "c2pa-kp-claimSigning")),
        ({"usage": ExtendedKeyUsageOID.SERVER_AUTH}, ("extended key usage",)),
        ({"known_issuer": False}, ("authorityKeyIdentifier",)),
        ({"signs": False}, ("digitalSignature",)),
        ({"authority": True}, ("authority",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_certificate_that_cannot_sign_is_refused_by_its_fault(
    tmp_path: Path, wrong: dict, facts: tuple[str, ...]
) -> None:
    made = chains.make(tmp_path, **wrong)
    with refuses(UserError, str(made.chain), *facts):
        open_signer(certificate=made.chain, key=made.key)


def test_a_weak_key_is_refused(tmp_path: Path) -> None:
    made = chains.make(tmp_path, rsa.generate_private_key(65537, 1024))
    with refuses(UserError, str(made.chain), "2048"):
        open_signer(certificate=made.chain, key=made.key)


def test_the_chain_must_be_whole_and_in_order(tmp_path: Path) -> None:
    made = chains.make(tmp_path)
    leaf, middle, _ = made.chain.read_text().split("-----END CERTIFICATE-----\n")
    end = "-----END CERTIFICATE-----\n"
    for text, facts in (
        (leaf + end, ("one certificate alone", "intermediates")),
        (middle + end + leaf + end, ("not issued by the next one", "first")),
        ("no certificate", ("PEM", "BEGIN CERTIFICATE")),
        (leaf[:-100] + end + middle + end, ("PEM",)),
    ):
        made.chain.write_text(text)
        with refuses(UserError, str(made.chain), *facts):
            open_signer(certificate=made.chain, key=made.key)
    made.chain.unlink()
    with refuses(UserError, str(made.chain), "check its path"):
        open_signer(certificate=made.chain, key=made.key)


def test_a_key_that_cannot_sign_is_refused_by_its_fault(tmp_path: Path) -> None:
    made = chains.make(tmp_path)
    for data, facts in (
        (chains.private_pem(made.private, PrivateFormat.TraditionalOpenSSL), ("PKCS#8", "openssl")),
        (chains.private_pem(made.private, password=b"secret"), ("encrypted", "password")),
        (chains.private_pem(chains.new_key()), ("not the key of the certificate", "signer")),
        (b"nothing", ("BEGIN PRIVATE KEY",)),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", ("no private key",)),
    ):
        made.key.write_bytes(data)
        with refuses(UserError, str(made.key), *facts):
            open_signer(certificate=made.chain, key=made.key)


def test_the_development_chain_is_made_once_and_its_key_is_its_owners(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "dev-cert"
    first = open_signer(dev_folder=folder)
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert {path.name for path in folder.iterdir()} == {"key.pem", "chain.pem", "anchors.pem"}
    assert open_signer(dev_folder=folder) == first
    assert open_signer(dev_folder=tmp_path / "other") != first


def test_without_a_certificate_nothing_signs_unless_the_development_chain_is_asked_for(
    tmp_path: Path,
) -> None:
    made = chains.make(tmp_path)
    with refuses(UserError, "certificate", "development chain"):
        open_signer()
    with refuses(UserError, "one of the two"):
        open_signer(certificate=made.chain)
    with refuses(UserError, "one of the two"):
        open_signer(certificate=made.chain, key=made.key, callback="os:getpid")
    with refuses(UserError, "one of the two"):
        open_signer(certificate=made.chain, key=made.key, dev_folder=tmp_path / "dev")
    assert not (tmp_path / "dev").exists()
