//! Slots to receive into, and what the kernel says about each datagram.

#![expect(
    unsafe_code,
    reason = "the message headers of recvmmsg are raw pointers"
)]

use std::alloc::{Layout, handle_alloc_error};
use std::io;
use std::mem;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

use super::{ControlSpace, Local};

/// The bytes of a slot: the largest datagram (65,507 or 65,527 bytes), or as much coalesced by GRO, fits whole.
const CAPACITY: usize = 65_536;

/// The most bytes that can stand in front of a slot's datagram.
pub(in crate::relay) const MAX_HEADROOM: usize = 64;

/// From one slot to the next. Not a power of two: the first lines of slots 64 kB apart would all fall into
/// the same few sets of the CPU's caches, and small datagrams touch nothing but first lines.
const STRIDE: usize = MAX_HEADROOM + CAPACITY + 8 * 64;

/// A heap array that the kernel writes to: reached through raw pointers only, so that moving its owner
/// leaves the pointers in message headers valid.
struct Fixed<T>(NonNull<[T]>);

impl<T: Copy> Fixed<T> {
    fn new(value: T, count: usize) -> Self {
        let array: Box<[T]> = vec![value; count].into_boxed_slice();
        Self(NonNull::from(Box::leak(array)))
    }

    /// A pointer to an element.
    fn at(&self, index: usize) -> *mut T {
        assert!(index < self.0.len());
        // SAFETY: the index is inside the allocation, which lives as long as `self`
        unsafe { self.0.cast::<T>().as_ptr().add(index) }
    }
}

impl<T> Drop for Fixed<T> {
    fn drop(&mut self) {
        // SAFETY: the pointer came from a leaked box and is dropped once
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// Zeroed memory that takes up only what is written to, straight from the kernel: an allocator, or huge pages,
/// would make all of every slot resident for the few bytes at each one's beginning.
struct Pages {
    start: NonNull<u8>,
    length: usize,
}

impl Pages {
    /// As much as asked for, or an abort as of any allocation that fails.
    fn new(length: usize) -> Self {
        if length == 0 {
            return Self {
                start: NonNull::dangling(),
                length,
            };
        }
        // SAFETY: a new private mapping at an address of the kernel's choice touches no memory there is
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let start = match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => start,
            _ => handle_alloc_error(Layout::array::<u8>(length).unwrap_or(Layout::new::<u8>())),
        };
        // SAFETY: the range is the mapping just made. A kernel without huge pages refuses, which is as good.
        unsafe { libc::madvise(start.as_ptr().cast(), length, libc::MADV_NOHUGEPAGE) };
        Self { start, length }
    }

    /// A pointer to a byte.
    fn at(&self, index: usize) -> *mut u8 {
        assert!(index < self.length);
        // SAFETY: the index is inside the mapping, which lives as long as `self`
        unsafe { self.start.as_ptr().add(index) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: the mapping was made by `new`, is unmapped once, and nobody has pointers into it
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
        }
    }
}

/// What the kernel says about a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::relay) struct Control {
    /// Several datagrams of this many bytes each (the last may be shorter) were received as one (`UDP_GRO`).
    pub(in crate::relay) segment: Option<u16>,
    /// Where it was sent to (`IP_PKTINFO`, `IP_ORIGDSTADDR`).
    pub(in crate::relay) local: Option<Local>,
    /// The port that it was sent to, where that is not always the socket's (`IP_ORIGDSTADDR`).
    pub(in crate::relay) port: Option<u16>,
    /// DSCP and ECN (`IP_RECVTOS`).
    pub(in crate::relay) tos: u8,
    /// How many datagrams this socket has lost for want of buffer, since it was made (`SO_RXQ_OVFL`);
    /// wraps, and is said only once there were any.
    pub(in crate::relay) overflow: Option<u32>,
}

/// A received datagram, or several of one size.
#[derive(Debug, Clone, Copy)]
pub(in crate::relay) struct Received<'a> {
    /// Its payload.
    pub(in crate::relay) bytes: &'a [u8],
    /// Who sent it; `None` from a connected socket, where it is known.
    pub(in crate::relay) peer: Option<SocketAddr>,
    /// What the kernel says about it.
    pub(in crate::relay) control: Control,
    /// It was longer than a slot, or the control messages than their space: not to be used.
    pub(in crate::relay) truncated: bool,
}

/// Part of a slot: one datagram to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::relay) struct Part {
    slot: usize,
    /// From the start of the slot's headroom.
    start: usize,
    length: usize,
}

impl Part {
    /// `length` bytes of a slot's datagram from its byte `from` on.
    pub(in crate::relay) fn new(slot: usize, from: usize, length: usize) -> Self {
        Self {
            slot,
            start: MAX_HEADROOM + from,
            length,
        }
    }

    /// The same with what [`Arena::prefix`] wrote in front of the slot's datagram.
    pub(in crate::relay) fn with_prefix(slot: usize, prefix: usize, length: usize) -> Self {
        Self {
            slot,
            start: MAX_HEADROOM - prefix,
            length: prefix + length,
        }
    }
}

impl Part {
    /// How many bytes it has.
    pub(super) fn length(self) -> usize {
        self.length
    }
}

/// Slots to receive into.
pub(in crate::relay) struct Arena {
    slots: usize,
    memory: Pages,
    names: Fixed<libc::sockaddr_storage>,
    controls: Fixed<ControlSpace>,
    headers: Fixed<libc::mmsghdr>,
    // the headers point into it; nothing else does
    _iovecs: Fixed<libc::iovec>,
    /// Headers from here on are as [`Arena::new`] made them.
    clean_from: usize,
    /// Whether senders' addresses are wanted.
    named: bool,
}

impl Arena {
    /// An arena for a socket whose peers vary (`named`), or for connected ones.
    ///
    /// Takes 64 kB of address space a slot, but memory only for the bytes that datagrams fill.
    pub(in crate::relay) fn new(slots: usize, named: bool) -> Self {
        // SAFETY: all three are plain C structures for which zero is a valid value
        let (name, header, iovec) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
        let arena = Self {
            slots,
            memory: Pages::new(slots * STRIDE),
            names: Fixed::new(name, slots),
            controls: Fixed::new([0; 16], slots),
            headers: Fixed::new(header, slots),
            _iovecs: Fixed::new(iovec, slots),
            clean_from: 0,
            named,
        };
        for slot in 0..slots {
            let iovec = arena._iovecs.at(slot);
            // SAFETY: `at` yields valid pointers, and this arena is not shared yet
            unsafe {
                (*iovec).iov_base = arena.memory.at(slot * STRIDE + MAX_HEADROOM).cast();
                (*iovec).iov_len = CAPACITY;
                let header = &mut (*arena.headers.at(slot)).msg_hdr;
                header.msg_iov = iovec;
                header.msg_iovlen = 1;
                if named {
                    header.msg_name = arena.names.at(slot).cast();
                }
                header.msg_control = arena.controls.at(slot).cast();
            }
            arena.make_clean(slot);
        }
        Self {
            clean_from: 0,
            ..arena
        }
    }

    /// One whose slots take fewer bytes than the largest datagram has.
    #[cfg(test)]
    pub(super) fn short(slots: usize, named: bool, capacity: usize) -> Self {
        let arena = Self::new(slots, named);
        for slot in 0..slots {
            // SAFETY: `at` yields valid pointers, and this arena is not shared yet
            unsafe { (*arena._iovecs.at(slot)).iov_len = capacity.min(CAPACITY) };
        }
        arena
    }

    /// How many datagrams can be received before slots are used again.
    pub(in crate::relay) fn slots(&self) -> usize {
        self.slots
    }

    /// Sets what the kernel overwrites with lengths of its own.
    fn make_clean(&self, slot: usize) {
        // SAFETY: the pointer is valid, and no reference to a header is kept anywhere
        let header = unsafe { &mut (*self.headers.at(slot)).msg_hdr };
        if self.named {
            header.msg_namelen = mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        }
        header.msg_controllen = mem::size_of::<ControlSpace>() as _;
        header.msg_flags = 0;
    }

    /// Receives what waits into the slots `from..from + limit`, without waiting.
    ///
    /// Fewer than `limit` means that the queue was empty behind the last one: more to come raises a new
    /// edge in epoll.
    ///
    /// # Errors
    /// Only when there is not even one: `WouldBlock`, or the socket's pending error (on a connected socket
    /// `ConnectionRefused`: an ICMP port unreachable came back).
    pub(in crate::relay) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        from: usize,
        limit: usize,
    ) -> io::Result<usize> {
        let limit = limit.min(self.slots.saturating_sub(from));
        if limit == 0 {
            return Ok(0);
        }
        for slot in from..self.clean_from {
            self.make_clean(slot);
        }
        self.clean_from = self.clean_from.min(from);
        let received = loop {
            // SAFETY: `limit` headers from `from` on are initialised; what they point to lives in this
            // arena, is as long as they say, and is borrowed by nobody while it is borrowed mutably here
            let result = unsafe {
                libc::recvmmsg(
                    socket.as_raw_fd(),
                    self.headers.at(from),
                    limit as libc::c_uint,
                    libc::MSG_DONTWAIT as _,
                    ptr::null_mut(),
                )
            };
            if let Ok(received) = usize::try_from(result) {
                break received;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        };
        self.clean_from = from + received;
        Ok(received)
    }

    /// What the last [`Arena::receive`] that covered this slot put there.
    pub(in crate::relay) fn received(&self, slot: usize) -> Received<'_> {
        // SAFETY: the pointer is valid; the kernel writes only during `receive`, which needs `&mut self`
        let message = unsafe { &*self.headers.at(slot) };
        let length = (message.msg_len as usize).min(CAPACITY);
        let header = &message.msg_hdr;
        let start = self.memory.at(slot * STRIDE + MAX_HEADROOM);
        // SAFETY: the slot has CAPACITY initialised bytes from `start` on
        let bytes = unsafe { std::slice::from_raw_parts(start, length) };
        Received {
            bytes,
            peer: if self.named { self.peer(slot) } else { None },
            control: control(header),
            truncated: header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
        }
    }

    fn peer(&self, slot: usize) -> Option<SocketAddr> {
        let name = self.names.at(slot);
        // SAFETY: sockaddr_storage is large and aligned enough for each family's structure; `ss_family`
        // tells which one the kernel wrote, and zeroes are valid for all of them
        unsafe {
            match libc::c_int::from((*name).ss_family) {
                libc::AF_INET => {
                    let name = &*name.cast::<libc::sockaddr_in>();
                    let addr = Ipv4Addr::from(u32::from_be(name.sin_addr.s_addr));
                    Some(SocketAddrV4::new(addr, u16::from_be(name.sin_port)).into())
                }
                libc::AF_INET6 => {
                    let name = &*name.cast::<libc::sockaddr_in6>();
                    let addr = Ipv6Addr::from(name.sin6_addr.s6_addr);
                    let port = u16::from_be(name.sin6_port);
                    // an answer does not carry the flow label of the question
                    Some(SocketAddrV6::new(addr, port, 0, name.sin6_scope_id).into())
                }
                _ => None,
            }
        }
    }

    /// Writes `prefix` directly in front of a slot's datagram, for [`Part::with_prefix`].
    pub(in crate::relay) fn prefix(&mut self, slot: usize, prefix: &[u8]) {
        assert!(prefix.len() <= MAX_HEADROOM);
        let start = self.memory.at(slot * STRIDE + MAX_HEADROOM - prefix.len());
        // SAFETY: the slot's headroom has that many bytes, and `&mut self` excludes every reader
        unsafe { ptr::copy_nonoverlapping(prefix.as_ptr(), start, prefix.len()) };
    }

    /// The bytes of a part.
    pub(in crate::relay) fn bytes(&self, part: Part) -> &[u8] {
        assert!(part.slot < self.slots && part.start + part.length <= STRIDE);
        let start = self.memory.at(part.slot * STRIDE + part.start);
        // SAFETY: the assertion keeps the range inside the slot, whose bytes are all initialised
        unsafe { std::slice::from_raw_parts(start, part.length) }
    }
}

/// Reads the control messages of a received datagram.
fn control(header: &libc::msghdr) -> Control {
    let mut control = Control::default();
    // SAFETY: `header` is one the kernel has filled in: msg_control holds msg_controllen bytes of
    // well-formed control messages; each value is read with the size its type has, after comparing lengths
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = next.as_ref() {
            let data = libc::CMSG_DATA(message);
            let length = message.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
            match (message.cmsg_level, message.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) if length >= 4 => {
                    // a C int by the documentation
                    let size = data.cast::<libc::c_int>().read_unaligned();
                    control.segment = u16::try_from(size).ok().filter(|&size| size > 0);
                }
                (libc::SOL_IP, libc::IP_PKTINFO)
                    if length >= mem::size_of::<libc::in_pktinfo>() =>
                {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    // the address to answer from, also where the datagram went to a broadcast address
                    let addr = Ipv4Addr::from(u32::from_be(info.ipi_spec_dst.s_addr));
                    control.local = Some(Local {
                        addr: addr.into(),
                        interface: 0,
                    });
                }
                (libc::SOL_IPV6, libc::IPV6_PKTINFO)
                    if length >= mem::size_of::<libc::in6_pktinfo>() =>
                {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    let addr = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                    let interface = if addr.is_unicast_link_local() {
                        info.ipi6_ifindex
                    } else {
                        0
                    };
                    control.local = (!addr.is_multicast()).then_some(Local {
                        addr: addr.into(),
                        interface,
                    });
                }
                (libc::SOL_IP, libc::IP_ORIGDSTADDR)
                    if length >= mem::size_of::<libc::sockaddr_in>() =>
                {
                    let to = data.cast::<libc::sockaddr_in>().read_unaligned();
                    let addr = Ipv4Addr::from(u32::from_be(to.sin_addr.s_addr));
                    control.local = Some(Local {
                        addr: addr.into(),
                        interface: 0,
                    });
                    control.port = Some(u16::from_be(to.sin_port));
                }
                (libc::SOL_IPV6, libc::IPV6_ORIGDSTADDR)
                    if length >= mem::size_of::<libc::sockaddr_in6>() =>
                {
                    let to = data.cast::<libc::sockaddr_in6>().read_unaligned();
                    control.local = Some(Local {
                        addr: Ipv6Addr::from(to.sin6_addr.s6_addr).into(),
                        interface: to.sin6_scope_id,
                    });
                    control.port = Some(u16::from_be(to.sin6_port));
                }
                (libc::SOL_IP, libc::IP_TOS) if length >= 1 => control.tos = data.read(),
                (libc::SOL_IPV6, libc::IPV6_TCLASS) if length >= 4 => {
                    let class = data.cast::<libc::c_int>().read_unaligned();
                    control.tos = class as u8;
                }
                (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) if length >= 4 => {
                    control.overflow = Some(data.cast::<u32>().read_unaligned());
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, message);
        }
    }
    control
}
