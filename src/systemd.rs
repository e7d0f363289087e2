//! What is said to systemd and taken from it: readiness, status lines, stored and passed sockets, the watchdog.
//!
//! Everything here does nothing where no service manager is there (`$NOTIFY_SOCKET`, `$LISTEN_FDS`).
//! Must not know: what the sockets are for.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::warn;

/// How many descriptors the kernel takes with one message (`SCM_MAX_FD`).
const MAX_DESCRIPTORS: usize = 253;

/// Tells the service manager.
pub fn notify(state: &[NotifyState]) {
    // without systemd there is nobody to tell, which is no error
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "cannot notify systemd");
    }
}

/// Says that the configuration is being read again; [`NotifyState::Ready`] ends it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => warn!(%error, "cannot read the clock"),
    }
}

/// Whether descriptors can be stored at all.
pub fn stores() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Has the service manager keep listening sockets over a restart, under a name (`FileDescriptorStoreMax=`
/// permitting). It recognises what it has already.
pub fn store(name: &str, listeners: &[impl AsFd]) {
    if !stores() {
        return;
    }
    for some in listeners.chunks(MAX_DESCRIPTORS) {
        let descriptors: Vec<_> = some.iter().map(AsFd::as_fd).collect();
        let state = [NotifyState::FdStore, NotifyState::FdName(name)];
        if let Err(error) = sd_notify::notify_with_fds(&state, &descriptors) {
            warn!(%error, instance = name, "cannot store listening sockets with systemd");
        }
    }
}

/// Takes back what was stored under a name.
pub fn forget(name: &str) {
    if stores() {
        notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
    }
}

/// A descriptor that the service manager passed, with its name.
#[derive(Debug)]
pub struct Passed {
    /// `FileDescriptorName=` of the socket unit, or the name it was stored under.
    pub name: String,
    /// The descriptor.
    pub descriptor: OwnedFd,
}

/// What the service manager passed, from a socket unit or from its store. Once, before any other
/// descriptor is opened.
///
/// # Errors
/// When the environment variables contradict each other.
pub fn passed() -> io::Result<Vec<Passed>> {
    let passed = sd_notify::listen_fds_with_names()?.map(|(number, name)| Passed {
        name,
        // SAFETY: the service manager passed this number to this very process ($LISTEN_PID was compared),
        // and nothing else in the process knows it
        #[expect(
            unsafe_code,
            reason = "systemd passes descriptors by number, which has no safe form"
        )]
        descriptor: unsafe { OwnedFd::from_raw_fd(number) },
    });
    Ok(passed.collect())
}

/// How often the service manager wants to hear that all is well, where it does: twice in its time limit.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2)
}
