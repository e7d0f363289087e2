//! Unix listeners: a socket's file, who may open it, and what a process that is gone left behind.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Group, Uid, User, chown};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{BACKLOG, Failure};
use crate::model::{SocketMode, SocketOwner, SocketPath};

/// Binds a Unix socket whose file these users may open.
///
/// A socket file that nobody listens at any more is replaced; one that is alive, or a file of another kind, is
/// left alone. There is no moment at which more users may open the file than in the end.
///
/// # Errors
/// `EADDRINUSE` when somebody listens there; when the directory is not there or cannot be written, or the file
/// cannot be given to its owner.
pub fn unix_listener(
    path: &SocketPath,
    mode: SocketMode,
    owner: Option<&SocketOwner>,
) -> Result<UnixListener, Failure> {
    let path = path.get();
    let (user, group) = match owner {
        Some(owner) => (user_id(owner)?, group_id(owner)?),
        None => (None, None),
    };
    remove_stale(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)
        .map_err(Failure::at("open a socket"))?;
    let refused = |operation| move |errno: Errno| Failure::at(operation)(errno.into());
    // bind() makes the file with the socket's own mode, which the umask can only narrow; before it is given
    // away nobody else may open it
    let narrow = match (user, group) {
        (None, None) => mode.get(),
        _ => mode.get() & 0o700,
    };
    fchmod(&socket, Mode::from_bits_truncate(narrow)).map_err(refused("set the socket's mode"))?;
    let addr = SockAddr::unix(path).map_err(Failure::at("use the path"))?;
    socket.bind(&addr).map_err(Failure::at("bind"))?;
    let file = NewFile(path);
    if user.is_some() || group.is_some() {
        chown(path, user, group).map_err(refused("give the socket's file to its owner"))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode.get()))
        .map_err(Failure::at("set the mode of the socket's file"))?;
    socket.listen(BACKLOG).map_err(Failure::at("listen"))?;
    file.stays();
    Ok(UnixListener::from(OwnedFd::from(socket)))
}

/// The file of a socket that is not complete yet: it goes with the value.
struct NewFile<'p>(&'p Path);

impl NewFile<'_> {
    fn stays(self) {
        std::mem::forget(self);
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        // what stays behind is replaced next time
        let _ = fs::remove_file(self.0);
    }
}

/// Removes the file of a socket of ours that is not to be connected to any more.
pub fn remove_socket_file(path: &SocketPath) {
    if is_reachable(path) {
        // a file that stays is replaced by the next listener
        let _ = fs::remove_file(path.get());
    }
}

/// Has the file of a socket that is bound already opened by others than before.
///
/// # Errors
/// When the owner is unknown, or the file is not ours to change.
pub fn set_access(
    path: &SocketPath,
    mode: Option<SocketMode>,
    owner: Option<&SocketOwner>,
) -> Result<(), Failure> {
    if let Some(owner) = owner {
        let (user, group) = (user_id(owner)?, group_id(owner)?);
        chown(path.get(), user, group)
            .map_err(|errno| Failure::at("give the socket's file to its owner")(errno.into()))?;
    }
    if let Some(mode) = mode {
        fs::set_permissions(path.get(), fs::Permissions::from_mode(mode.get()))
            .map_err(Failure::at("set the mode of the socket's file"))?;
    }
    Ok(())
}

/// Whether a socket's file is there, so that a listener that was handed over can be reached.
pub fn is_reachable(path: &SocketPath) -> bool {
    fs::symlink_metadata(path.get()).is_ok_and(|found| found.file_type().is_socket())
}

fn remove_stale(path: &Path) -> Result<(), Failure> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(Failure::at("look at what is at the path"))?,
    };
    if !found.file_type().is_socket() {
        let error = io::Error::from_raw_os_error(libc::EEXIST);
        return Err(Failure::at(
            "replace what is there, which is no socket: remove it, or choose another path",
        )(error));
    }
    if is_alive(path).map_err(Failure::at("ask who listens there"))? {
        let error = io::Error::from_raw_os_error(libc::EADDRINUSE);
        return Err(Failure::at("bind")(error));
    }
    fs::remove_file(path).map_err(Failure::at(
        "remove the socket file of a process that is gone",
    ))
}

/// Whether somebody listens at a socket's file. The connection that this may make is closed at once, which a
/// relay takes for a health check.
fn is_alive(path: &Path) -> io::Result<bool> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        // a full queue, or a file that is not for us to open, is somebody's
        _ => Ok(true),
    }
}

fn user_id(owner: &SocketOwner) -> Result<Option<Uid>, Failure> {
    let Some(name) = &owner.user else {
        return Ok(None);
    };
    if let Ok(number) = name.parse() {
        return Ok(Some(Uid::from_raw(number)));
    }
    let found =
        User::from_name(name).map_err(|errno| Failure::at("look up the user")(errno.into()))?;
    let found = found.ok_or_else(|| unknown("find its owner", "user", name))?;
    Ok(Some(found.uid))
}

fn group_id(owner: &SocketOwner) -> Result<Option<Gid>, Failure> {
    let Some(name) = &owner.group else {
        return Ok(None);
    };
    if let Ok(number) = name.parse() {
        return Ok(Some(Gid::from_raw(number)));
    }
    let found =
        Group::from_name(name).map_err(|errno| Failure::at("look up the group")(errno.into()))?;
    let found = found.ok_or_else(|| unknown("find its owner", "group", name))?;
    Ok(Some(found.gid))
}

fn unknown(operation: &'static str, kind: &str, name: &str) -> Failure {
    Failure::at(operation)(io::Error::new(
        io::ErrorKind::NotFound,
        format!("there is no {kind} {name} on this host"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_in(directory: &tempfile::TempDir) -> SocketPath {
        let path = directory.path().join("x.sock");
        path.to_str().unwrap().parse().unwrap()
    }

    fn mode_of(path: &SocketPath) -> u32 {
        fs::metadata(path.get()).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_stale_file_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = path_in(&directory);
        let first = unix_listener(&path, "0660".parse().unwrap(), None).unwrap();
        assert_eq!(mode_of(&path), 0o660);
        let taken = unix_listener(&path, SocketMode::DEFAULT, None).unwrap_err();
        assert_eq!(taken.errno(), Some(Errno::EADDRINUSE));
        drop(first);
        assert!(is_reachable(&path), "the file stays");
        let _second = unix_listener(&path, "0777".parse().unwrap(), None).unwrap();
        assert_eq!(mode_of(&path), 0o777);
        set_access(&path, Some("0600".parse().unwrap()), None).unwrap();
        assert_eq!(mode_of(&path), 0o600);
        remove_socket_file(&path);
        assert!(!is_reachable(&path));
    }

    #[test]
    fn what_is_no_socket_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = path_in(&directory);
        fs::write(path.get(), "precious").unwrap();
        let failure = unix_listener(&path, SocketMode::DEFAULT, None).unwrap_err();
        assert_eq!(failure.errno(), Some(Errno::EEXIST));
        assert_eq!(fs::read_to_string(path.get()).unwrap(), "precious");
    }

    #[test]
    fn an_unknown_owner_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = path_in(&directory);
        let owner = "no-such-user-here".parse().unwrap();
        let failure = unix_listener(&path, SocketMode::DEFAULT, Some(&owner)).unwrap_err();
        assert_eq!(
            failure.source.to_string(),
            "there is no user no-such-user-here on this host"
        );
        assert!(!path.get().exists());
    }
}
