//! Any bytes as a datagram from a proxy, for each of the three decoders (a header on every datagram, on the
//! first, Simple Proxy Protocol): the laws of `tests/it/udp/laws.rs` hold.
//!
//! Every input is also tried behind what the fuzzer would be long in finding: a v2 header of a client, of
//! LOCAL, with the input as its block, and the magic of Simple Proxy Protocol.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/it/udp/laws.rs"]
mod laws;

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

fuzz_target!(|bytes: &[u8]| {
    laws::assert_all(bytes);
    laws::assert_all(&[&[0x56, 0xec], bytes].concat());
    laws::assert_all(&[SIGNATURE, bytes].concat());
    if let Some((&addressing, block)) = bytes.split_first() {
        // as much of the block as it says, and the rest of the input as payload
        let length = block.first().map_or(0, |&length| usize::from(length));
        let length = (length.min(block.len()) as u16).to_be_bytes();
        for command in [0x20, 0x21] {
            laws::assert_all(&[SIGNATURE, &[command, addressing], &length, block].concat());
        }
    }
});
