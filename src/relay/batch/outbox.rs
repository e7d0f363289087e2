//! Datagrams to send through one socket with as few calls and messages as possible.

#![expect(
    unsafe_code,
    reason = "the message headers of sendmmsg are raw pointers"
)]

use std::io;
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::{Arena, ControlSpace, Local, Part};
use crate::model::Family;

/// The most segments the kernel takes in one send (`UDP_MAX_SEGMENTS` before Linux 6.9; 128 since).
const MAX_SEGMENTS: usize = 64;

/// The most bytes in one segmented send, below the 65,507 of an IPv4 packet.
const MAX_SEGMENTED: usize = 65_000;

/// The most messages the kernel takes in one call (`UIO_MAXIOV`).
const MAX_MESSAGES: usize = 1024;

/// The receiver of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::relay) enum Receiver {
    /// Whom the socket is connected to.
    Connected(Family),
    /// This address, in the socket's own family.
    Address(SocketAddr),
}

/// Where a message goes and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::relay) struct Envelope {
    /// Who gets it.
    pub(in crate::relay) to: Receiver,
    /// The address to send from; `None` leaves it to the socket.
    pub(in crate::relay) from: Option<Local>,
    /// DSCP and ECN.
    pub(in crate::relay) tos: u8,
}

struct Message {
    envelope: Envelope,
    /// The size of all parts but the last.
    size: usize,
    parts: std::ops::Range<usize>,
    bytes: usize,
    /// A shorter part was added: the kernel takes none behind it.
    closed: bool,
}

/// Up to which size datagrams are left to the kernel to cut, per socket or kind of socket.
#[derive(Debug, Clone, Copy)]
pub(in crate::relay) struct SegmentLimit(usize);

impl Default for SegmentLimit {
    /// Any size, until the kernel refuses one.
    fn default() -> Self {
        Self(MAX_SEGMENTED)
    }
}

impl SegmentLimit {
    /// After a refusal: smaller ones may do; EIO means that none will, on this path.
    fn lower(&mut self, refusal: &io::Error, size: usize) {
        self.0 = match refusal.raw_os_error() {
            Some(libc::EIO) => 0,
            _ => self.0.min(size.saturating_sub(1)),
        };
    }
}

/// What became of an [`Outbox`].
#[derive(Debug, Default)]
pub(in crate::relay) struct Sent {
    /// Datagrams the kernel took.
    pub(in crate::relay) datagrams: u64,
    /// Their bytes.
    pub(in crate::relay) bytes: u64,
    /// Datagrams it did not take.
    pub(in crate::relay) failed: u64,
    /// The last reason.
    pub(in crate::relay) error: Option<io::Error>,
}

/// A name in either family, as the kernel reads it.
#[derive(Clone, Copy)]
#[repr(C)]
union Name {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

/// Datagrams to send through one socket: adjacent ones of one size to one receiver leave as one message.
pub(in crate::relay) struct Outbox {
    messages: Vec<Message>,
    parts: Vec<Part>,
    // what the message headers point to, rebuilt for every call
    iovecs: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
    names: Vec<Name>,
    controls: Vec<ControlSpace>,
}

impl Outbox {
    /// An empty one.
    pub(in crate::relay) fn new() -> Self {
        Self {
            messages: Vec::new(),
            parts: Vec::new(),
            iovecs: Vec::new(),
            headers: Vec::new(),
            names: Vec::new(),
            controls: Vec::new(),
        }
    }

    /// Whether there is nothing to send.
    pub(in crate::relay) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Adds a datagram.
    pub(in crate::relay) fn push(&mut self, envelope: Envelope, part: Part, limit: SegmentLimit) {
        let length = part.length();
        if let Some(last) = self.messages.last_mut()
            && !last.closed
            && last.envelope == envelope
            && length <= last.size
            && last.size <= limit.0
            && length > 0
            && last.parts.len() < MAX_SEGMENTS
            && last.bytes + length <= MAX_SEGMENTED
        {
            last.parts.end += 1;
            last.bytes += length;
            last.closed = length < last.size;
        } else {
            let at = self.parts.len();
            self.messages.push(Message {
                envelope,
                size: length,
                parts: at..at + 1,
                bytes: length,
                closed: false,
            });
        }
        self.parts.push(part);
    }

    /// Sends everything, in order, and is empty again.
    ///
    /// What the kernel does not take is dropped, as a network does, and said in the result. Where it does not
    /// segment, the limit is lowered.
    pub(in crate::relay) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        arena: &Arena,
        limit: &mut SegmentLimit,
    ) -> Sent {
        let mut sent = Sent::default();
        let mut first = 0;
        while first < self.messages.len() {
            let count = (self.messages.len() - first).min(MAX_MESSAGES);
            self.build(first..first + count, arena);
            let mut done = 0;
            let mut earlier = true;
            while done < count {
                match self.transmit(socket, done) {
                    Ok(taken) => {
                        for message in &self.messages[first + done..first + done + taken] {
                            sent.datagrams += message.parts.len() as u64;
                            sent.bytes += message.bytes as u64;
                        }
                        done += taken;
                        earlier = true;
                    }
                    Err(error) if std::mem::take(&mut earlier) && is_too_big(&error) => {}
                    Err(error) => {
                        let at = first + done;
                        if self.messages[at].parts.len() > 1 && is_about_segments(&error) {
                            limit.lower(&error, self.messages[at].size);
                            self.without_segments(socket, arena, at, &mut sent);
                        } else {
                            sent.failed += self.messages[at].parts.len() as u64;
                            sent.error = Some(error);
                        }
                        done += 1;
                        earlier = true;
                    }
                }
            }
            first += count;
        }
        self.messages.clear();
        self.parts.clear();
        sent
    }

    /// Drops everything, for want of a socket to send it through.
    pub(in crate::relay) fn give_up(&mut self, error: io::Error) -> Sent {
        let failed = self.parts.len() as u64;
        self.messages.clear();
        self.parts.clear();
        Sent {
            failed,
            error: Some(error),
            ..Sent::default()
        }
    }

    /// One `sendmmsg` of the built messages from `skip` on: how many the kernel took, at least one.
    fn transmit(&mut self, socket: BorrowedFd<'_>, skip: usize) -> io::Result<usize> {
        let headers = &mut self.headers[skip..];
        loop {
            // SAFETY: `build` made the headers point into `iovecs`, `names` and `controls`, which have not
            // been touched since, and into an arena that the caller of `send` still borrows
            let result = unsafe {
                libc::sendmmsg(
                    socket.as_raw_fd(),
                    headers.as_mut_ptr(),
                    headers.len() as libc::c_uint,
                    (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as _,
                )
            };
            match usize::try_from(result) {
                // not documented to happen; without progress the caller would turn for ever
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(taken) => return Ok(taken),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Sends the datagrams of a message one by one where the kernel has refused to segment it: they do not
    /// fit the path's MTU (and have to be fragmented), or the path cannot segment at all (IPsec).
    fn without_segments(
        &mut self,
        socket: BorrowedFd<'_>,
        arena: &Arena,
        at: usize,
        sent: &mut Sent,
    ) {
        let message = &self.messages[at];
        let (envelope, parts) = (message.envelope, message.parts.clone());
        let mut single = Self::new();
        let mut none = SegmentLimit(0);
        for part in &self.parts[parts] {
            single.push(envelope, *part, none);
        }
        let result = single.send(socket, arena, &mut none);
        sent.datagrams += result.datagrams;
        sent.bytes += result.bytes;
        sent.failed += result.failed;
        sent.error = result.error.or(sent.error.take());
    }

    /// Fills in the message headers of a range of messages.
    fn build(&mut self, range: std::ops::Range<usize>, arena: &Arena) {
        let count = range.len();
        self.iovecs.clear();
        self.iovecs.reserve(self.parts.len());
        // SAFETY: plain C structures (and a union of two) for which zero is a valid value
        let (header, name) = unsafe { (mem::zeroed(), mem::zeroed()) };
        self.headers.clear();
        self.headers.resize(count, header);
        if self.names.len() < count {
            self.names.resize(count, name);
            self.controls.resize(count, [0; 16]);
        }
        let (names, controls) = (self.names.as_mut_ptr(), self.controls.as_mut_ptr());
        for (index, message) in self.messages[range].iter().enumerate() {
            let first = self.iovecs.len();
            for &part in &self.parts[message.parts.clone()] {
                let bytes = arena.bytes(part);
                let base = bytes.as_ptr().cast_mut().cast::<libc::c_void>();
                match self.iovecs[first..].last_mut() {
                    // neighbours in memory, as GRO delivers them
                    Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == base => {
                        last.iov_len += bytes.len();
                    }
                    _ => self.iovecs.push(libc::iovec {
                        iov_base: base,
                        iov_len: bytes.len(),
                    }),
                }
            }
            let header = &mut self.headers[index].msg_hdr;
            // SAFETY: room for every part was reserved, so that pushing moves nothing; `names` and
            // `controls` have at least `count` elements and are resized only before this loop
            unsafe {
                header.msg_iov = self.iovecs.as_mut_ptr().add(first);
                header.msg_iovlen = (self.iovecs.len() - first) as _;
                if let Receiver::Address(to) = message.envelope.to {
                    header.msg_name = names.add(index).cast();
                    header.msg_namelen = write_name(&mut *names.add(index), to);
                }
                header.msg_control = controls.add(index).cast();
                header.msg_controllen = mem::size_of::<ControlSpace>() as _;
            }
            write_control(header, message);
        }
    }
}

/// Whether a datagram was too big, this one or one before it: on a connected socket the kernel tells the next
/// call of an ICMP "too big", and does nothing else in it. Tried again, a datagram that meets a narrower path
/// is fragmented; one that is too big by itself fails again.
pub(in crate::relay) fn is_too_big(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EMSGSIZE)
}

/// Whether sending the datagrams one by one may succeed: EMSGSIZE or EINVAL (before Linux 6.10) when a
/// segment exceeds the path's MTU, EIO where the route transforms packets.
fn is_about_segments(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)
    )
}

fn write_name(name: &mut Name, to: SocketAddr) -> libc::socklen_t {
    match to {
        SocketAddr::V4(to) => {
            name.v4 = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: to.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: to.ip().to_bits().to_be(),
                },
                sin_zero: [0; 8],
            };
            mem::size_of::<libc::sockaddr_in>() as libc::socklen_t
        }
        SocketAddr::V6(to) => {
            name.v6 = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: to.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr {
                    s6_addr: to.ip().octets(),
                },
                sin6_scope_id: to.scope_id(),
            };
            mem::size_of::<libc::sockaddr_in6>() as libc::socklen_t
        }
    }
}

/// Writes the control messages of a message into the space its header points to, and their length.
fn write_control(header: &mut libc::msghdr, message: &Message) {
    let mut used = 0;
    let mut put = |level: libc::c_int, kind: libc::c_int, value: &[u8]| {
        // SAFETY: msg_control points to a ControlSpace of 128 bytes; the three messages below take at most
        // CMSG_SPACE(20) + CMSG_SPACE(4) + CMSG_SPACE(2) = 88 of them, each at a multiple of eight
        unsafe {
            let at = header.msg_control.byte_add(used).cast::<libc::cmsghdr>();
            (*at).cmsg_level = level;
            (*at).cmsg_type = kind;
            (*at).cmsg_len = libc::CMSG_LEN(value.len() as libc::c_uint) as _;
            ptr::copy_nonoverlapping(value.as_ptr(), libc::CMSG_DATA(at), value.len());
            used += libc::CMSG_SPACE(value.len() as libc::c_uint) as usize;
        }
    };
    match message.envelope.from {
        None => {}
        Some(Local {
            addr: IpAddr::V4(addr),
            ..
        }) => {
            // struct in_pktinfo: the interface (any), the address to send from, the destination (unused)
            let mut info = [0; 12];
            info[4..8].copy_from_slice(&addr.octets());
            put(libc::SOL_IP, libc::IP_PKTINFO, &info);
        }
        Some(Local {
            addr: IpAddr::V6(addr),
            interface,
        }) => {
            // struct in6_pktinfo: the address to send from, the interface
            let mut info = [0; 20];
            info[..16].copy_from_slice(&addr.octets());
            info[16..].copy_from_slice(&interface.to_ne_bytes());
            put(libc::SOL_IPV6, libc::IPV6_PKTINFO, &info);
        }
    }
    if message.envelope.tos != 0 {
        let value = libc::c_int::from(message.envelope.tos).to_ne_bytes();
        match message.envelope.to {
            Receiver::Connected(Family::V6) | Receiver::Address(SocketAddr::V6(_)) => {
                put(libc::SOL_IPV6, libc::IPV6_TCLASS, &value);
            }
            Receiver::Connected(Family::V4) | Receiver::Address(SocketAddr::V4(_)) => {
                put(libc::SOL_IP, libc::IP_TOS, &value);
            }
        }
    }
    if message.parts.len() > 1 {
        let size = message.size as u16;
        put(libc::SOL_UDP, libc::UDP_SEGMENT, &size.to_ne_bytes());
    }
    header.msg_controllen = used as _;
    if used == 0 {
        header.msg_control = ptr::null_mut();
    }
}
