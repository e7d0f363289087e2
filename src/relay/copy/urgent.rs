//! Urgent data (RFC 6093), which relayed connections carry as bytes like any other (`SO_OOBINLINE`).
//!
//! Owns: what is behind an urgent mark. A read ends there however much follows, so one that brought less than
//! there was room for need not have emptied the socket; and what follows is not announced again. A splice does
//! not even pass the mark, it has to be read past.

#![expect(unsafe_code, reason = "ioctl writes behind a pointer")]

use std::os::fd::AsRawFd;

mod raw {
    nix::ioctl_read_bad!(fionread, nix::libc::FIONREAD, nix::libc::c_int);
}

/// Whether there is more to read. An end, or an error, is none.
pub(super) fn is_more(from: &impl AsRawFd) -> bool {
    let mut bytes = 0;
    // SAFETY: the pointer is to the integer that FIONREAD writes (tcp(7), unix(7))
    let asked = unsafe { raw::fionread(from.as_raw_fd(), &raw mut bytes) };
    asked.is_ok() && bytes > 0
}
