//! Any bytes as a PROXY header: the laws of `tests/it/header/laws.rs` hold.
//!
//! The fuzzer finds its way through a v2 header's checksum only with help, so every input is also tried
//! as the addressing and the TLVs of a header whose fixed part and checksum are right.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/it/header/laws.rs"]
mod laws;

fuzz_target!(|bytes: &[u8]| {
    laws::assert_all(bytes);
    if let Some((&addressing, block)) = bytes.split_first() {
        laws::assert_all(&checksummed(addressing, block));
    }
});

/// A PROXY v2 header of this addressing and block, with a CRC32C behind them.
fn checksummed(addressing: u8, block: &[u8]) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
    header.push(addressing);
    let length = u16::try_from(block.len() + 7).unwrap_or(u16::MAX);
    header.extend(length.to_be_bytes());
    header.extend(block);
    header.extend([3, 0, 4, 0, 0, 0, 0]);
    let value_at = header.len() - 4;
    let checksum = laws::crc32c(&header);
    header[value_at..].copy_from_slice(&checksum.to_be_bytes());
    header
}
