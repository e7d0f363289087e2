//! The options that neither socket2 nor nix knows.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Sets an option whose value is a 32-bit number.
///
/// # Errors
/// As `setsockopt(2)`.
pub(super) fn set(
    socket: &impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    value: u32,
) -> io::Result<()> {
    // SAFETY: the pointer and the length are those of a local u32, which the kernel only reads; the
    // descriptor is open for as long as it is borrowed
    #[expect(unsafe_code, reason = "the only way to such an option")]
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
