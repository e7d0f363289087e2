//! The PROXY header decoder, alone: nanoseconds per header, and no allocation. To reach: 100 ns for v1 and v2.
//!
//! ```text
//! cargo bench --bench header
//! ```

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use criterion::{Criterion, criterion_group, criterion_main};
use mmproxyctl::relay::header::{Decoded, MAX_V1, Transport, V2, decode, encode_v1, encode_v2};

/// The system's allocator, counting.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator as it is
#[expect(unsafe_code, reason = "an allocator that counts is one")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from the system's allocator with this layout
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What is decoded, as a proxy sends it.
fn samples() -> Vec<(&'static str, Vec<u8>)> {
    let addr = |text: &str| text.parse::<SocketAddr>().expect("an address");
    let v4 = (addr("198.51.100.200:54321"), addr("203.0.113.10:443"));
    let v6 = (
        addr("[2001:db8:1:2:3:4:5:6]:54321"),
        addr("[2001:db8:a:b:c:d:e:f]:443"),
    );
    let widest = addr("[1111:2222:3333:4444:5555:6666:7777:8888]:65535");
    let tlvs = V2::proxied(v6.0, v6.1, Transport::Stream)
        .tlv(0x02, b"www.example.com")
        .and_then(|header| header.tlv(0x05, &[0x5a; 36]))
        .and_then(V2::finish_with_crc32c)
        .expect("a header with extensions");
    vec![
        ("v1/tcp4", encode_v1(v4.0, v4.1)),
        ("v1/tcp6", encode_v1(v6.0, v6.1)),
        ("v1/tcp6, longest", encode_v1(widest, widest)),
        ("v2/tcp4", encode_v2(v4.0, v4.1)),
        ("v2/tcp6", encode_v2(v6.0, v6.1)),
        ("v2/tcp6, authority, unique id, crc32c", tlvs),
    ]
}

fn headers(criterion: &mut Criterion) {
    for (name, header) in samples() {
        assert!(!name.starts_with("v1") || header.len() <= MAX_V1, "{name}");
        // as it arrives: with the client's first bytes behind it
        let bytes = [&header[..], b"SSH-2.0-OpenSSH_9.8\r\n"].concat();
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let decoded = decode(black_box(&bytes));
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert_eq!(allocations, 0, "{name}: the decoder allocates");
        assert!(
            matches!(decoded, Ok(Decoded::Complete { length, .. }) if length == header.len()),
            "{name}: {decoded:?}"
        );
        criterion.bench_function(name, |bencher| {
            bencher.iter(|| decode(black_box(&bytes)).is_ok())
        });
        // one byte missing: what a header split over two reads costs before the second
        let part = &header[..header.len() - 1];
        assert_eq!(decode(part), Ok(Decoded::Incomplete), "{name}");
        criterion.bench_function(&format!("{name}, incomplete"), |bencher| {
            bencher.iter(|| decode(black_box(part)).is_ok());
        });
    }
}

criterion_group!(benches, headers);
criterion_main!(benches);
