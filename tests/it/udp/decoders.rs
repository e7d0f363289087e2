//! The decoders of the three kinds of sender: laws that hold for any datagram, and what fuzzing has found.

use proptest::prelude::*;

use super::laws;
use crate::header::generate;
use crate::support::malformed;

/// Simple Proxy Protocol headers and what is nearly one, with something behind.
fn spp() -> impl Strategy<Value = Vec<u8>> {
    let magic = prop_oneof![4 => Just([0x56, 0xec]), 1 => any::<[u8; 2]>()];
    let rest = prop::collection::vec(any::<u8>(), 0..80);
    (magic, rest).prop_map(|(magic, rest)| [&magic[..], &rest].concat())
}

proptest! {
    #[test]
    fn laws_hold_for_headers_with_payload(sample in generate::header(), payload: Vec<u8>) {
        laws::assert_all(&[sample.bytes, payload].concat());
    }

    #[test]
    fn laws_hold_for_damaged_headers(bytes in generate::damaged()) {
        laws::assert_all(&bytes);
    }

    #[test]
    fn laws_hold_for_simple_proxy_protocol(bytes in spp()) {
        laws::assert_all(&bytes);
    }

    #[test]
    fn laws_hold_for_noise(bytes in generate::noise()) {
        laws::assert_all(&bytes);
    }
}

#[test]
fn laws_hold_for_what_is_no_header() {
    for case in malformed::all() {
        laws::assert_all(&case.bytes);
    }
}

/// The largest datagram there is, as each mode sees it.
#[test]
fn laws_hold_for_the_largest_datagram() {
    for beginning in [
        &b""[..],
        b"\r\n\r\n\0\r\nQUIT\n\x20\x00\xff\xe0",
        b"\x56\xec",
    ] {
        let mut bytes = beginning.to_vec();
        bytes.resize(65_507, 0);
        laws::assert_all(&bytes);
    }
}
