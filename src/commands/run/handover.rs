//! The way from one process to its successor: listening sockets, locks and the control socket go over a
//! socket pair, while both run.
//!
//! The old process starts the program anew, sends everything, and waits. The new one starts its relays on
//! the passed sockets and says that it is ready; only then does the old one stop accepting. When the new
//! one fails before that, nothing has changed. The sockets are the same kernel objects in both, so no
//! connection is refused at any time.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};
use socket2::SockRef;

use crate::runtime_dir::Lock;
use crate::socket::listening::Listening;

/// Names the successor's end of the socket pair.
const VARIABLE: &str = "MMPROXY_HANDOVER";
/// How long the successor may take to be ready.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many descriptors the kernel takes with one message (`SCM_MAX_FD`).
const MAX_DESCRIPTORS: usize = 253;
/// The longest message in bytes: a name, or the successor's complaint.
const MAX_MESSAGE: usize = 16 << 10;

/// A message; what it is about comes with it as descriptors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Message {
    /// Listening sockets.
    Listeners,
    /// The lock of an instance, or of the process.
    Lock(String),
    /// The control socket.
    Control,
    /// That was all.
    End,
    /// The successor listens. `main` is its main process towards the service manager.
    Ready { pid: u32, main: u32 },
    /// The successor does not, and is gone.
    Failed(String),
}

/// What a process hands to its successor.
#[derive(Debug, Default)]
pub(super) struct Estate {
    /// Listening sockets of all instances.
    pub(super) listeners: Vec<Listening>,
    /// Locks by name.
    pub(super) locks: BTreeMap<String, OwnedFd>,
    /// The control socket.
    pub(super) control: Option<OwnedFd>,
}

/// A successor that is ready. Dropping it lets the successor know that it is on its own.
#[derive(Debug)]
pub(super) struct Successor {
    /// Its process id.
    pub(super) pid: u32,
    /// Of its main process towards the service manager.
    pub(super) main: u32,
    _socket: OwnedFd,
}

/// Starts the program anew with the same arguments, gives it everything, waits until it is ready. Blocking.
pub(super) fn hand_over(program: PathBuf, estate: Estate) -> anyhow::Result<Successor> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .context("cannot make a socket pair")?;
    limit_waits(&ours)?;
    spawn_detached(&program, theirs)
        .with_context(|| format!("cannot start {}", program.display()))?;
    // a successor that cannot start closes its end while we still send: its reason is read below
    let sent = send_all(&ours, estate);
    match receive(&ours) {
        Ok(Some((Message::Ready { pid, main }, _))) => {
            sent?;
            Ok(Successor {
                pid,
                main,
                _socket: ours,
            })
        }
        Ok(Some((Message::Failed(reason), _))) => bail!("the new process did not start: {reason}"),
        Ok(Some(_)) => bail!("the new process does not understand the handover: another version"),
        Ok(None) => bail!("the new process ended before it was ready: see its log"),
        Err(error) => Err(error).context("the new process was not ready in time"),
    }
}

fn send_all(socket: &OwnedFd, estate: Estate) -> anyhow::Result<()> {
    let say = |message: &Message, descriptors: &[i32]| {
        send(socket, message, descriptors).context("cannot pass the sockets on")
    };
    for some in estate.listeners.chunks(MAX_DESCRIPTORS) {
        let descriptors: Vec<_> = some.iter().map(|some| some.as_fd().as_raw_fd()).collect();
        say(&Message::Listeners, &descriptors)?;
    }
    for (name, lock) in estate.locks {
        say(&Message::Lock(name), &[lock.as_raw_fd()])?;
    }
    if let Some(control) = estate.control {
        say(&Message::Control, &[control.as_raw_fd()])?;
    }
    say(&Message::End, &[])
}

/// Starts the program as a child of init rather than of this process, which is going to end.
fn spawn_detached(program: &PathBuf, socket: OwnedFd) -> io::Result<()> {
    let number = socket.as_raw_fd();
    let mut command = Command::new(program);
    let mut arguments = std::env::args_os();
    if let Some(name) = arguments.next() {
        // called as go-mmproxy, the successor has to know other flags
        command.arg0(name);
    }
    let arguments: Vec<OsString> = arguments.collect();
    command
        .args(arguments)
        .env(VARIABLE, number.to_string())
        // they name this process and what was passed to it
        .env_remove("LISTEN_PID")
        .env_remove("LISTEN_FDS")
        .env_remove("LISTEN_FDNAMES")
        .env_remove("WATCHDOG_PID")
        .stdin(Stdio::null());
    // SAFETY: between fork and exec only async-signal-safe calls: fcntl, fork, _exit. The second fork
    // leaves a process whose parent ends at once, so init becomes its parent, which reaps it.
    #[expect(
        unsafe_code,
        reason = "a descriptor that survives exec, and a process that is not ours, need pre_exec"
    )]
    unsafe {
        command.pre_exec(move || {
            fcntl(&socket, FcntlArg::F_SETFD(FdFlag::empty()))?;
            match libc::fork() {
                -1 => Err(io::Error::last_os_error()),
                0 => Ok(()),
                _ => libc::_exit(0),
            }
        });
    }
    let mut between = command.spawn()?;
    between.wait()?;
    Ok(())
}

/// What a process got from the one before, and the way to answer it.
#[derive(Debug)]
pub(super) struct Inheritance {
    socket: OwnedFd,
    /// Listening sockets, by no particular order.
    pub(super) listeners: Vec<Listening>,
    /// Locks by name.
    pub(super) locks: BTreeMap<String, Lock>,
    /// The control socket.
    pub(super) control: Option<UnixListener>,
}

/// Takes what the process before hands over, where there is one.
pub(super) fn receive_all() -> anyhow::Result<Option<Inheritance>> {
    let Some(number) = std::env::var_os(VARIABLE) else {
        return Ok(None);
    };
    let number: i32 = number
        .to_str()
        .and_then(|number| number.parse().ok())
        .filter(|number| *number > 2)
        .with_context(|| format!("${VARIABLE} is no descriptor"))?;
    // SAFETY: the process before left this descriptor open for us and told its number; it is taken once,
    // before anything else is opened. A wrong number fails in the calls below.
    #[expect(
        unsafe_code,
        reason = "a descriptor passed over exec is a number, which has no safe form"
    )]
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .with_context(|| format!("${VARIABLE} is no descriptor"))?;
    limit_waits(&socket)?;
    let mut all = Inheritance {
        socket,
        listeners: Vec::new(),
        locks: BTreeMap::new(),
        control: None,
    };
    loop {
        let received = receive(&all.socket).context("cannot take over from the process before")?;
        let Some((message, descriptors)) = received else {
            bail!("the process before ended in the midst of the handover");
        };
        match message {
            Message::Listeners => {
                for descriptor in descriptors {
                    let listener = Listening::from_descriptor(descriptor)?;
                    all.listeners.push(listener.context(
                        "the process before passed something else than a listening socket",
                    )?);
                }
            }
            Message::Lock(name) => {
                if let Some(descriptor) = descriptors.into_iter().next() {
                    all.locks.insert(name, Lock::take_over(descriptor)?);
                }
            }
            Message::Control => {
                all.control = descriptors.into_iter().next().map(UnixListener::from)
            }
            Message::End => return Ok(Some(all)),
            Message::Ready { .. } | Message::Failed(_) => {
                bail!("the process before does not understand the handover: another version")
            }
        }
    }
}

/// The way back to the process before.
#[derive(Debug)]
pub(super) struct Answer(OwnedFd);

impl Inheritance {
    /// Leaves the way back, and the rest to be moved out.
    pub(super) fn answer(&self) -> io::Result<Answer> {
        Ok(Answer(self.socket.try_clone()?))
    }
}

impl Answer {
    /// Tells the process before that it may go, and waits until it has said so to the service manager.
    /// Blocking.
    pub(super) fn ready(self, main: u32) -> io::Result<()> {
        let pid = std::process::id();
        send(&self.0, &Message::Ready { pid, main }, &[])?;
        receive(&self.0).map(|_| ())
    }

    /// Tells the process before why it has to go on.
    pub(super) fn failed(self, reason: &str) -> io::Result<()> {
        let mut reason = reason.to_owned();
        reason.truncate(reason.floor_char_boundary(MAX_MESSAGE / 2));
        send(&self.0, &Message::Failed(reason), &[])
    }
}

fn limit_waits(socket: &impl AsFd) -> anyhow::Result<()> {
    let socket = SockRef::from(socket);
    socket
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| socket.set_write_timeout(Some(PATIENCE)))
        .context("cannot limit the wait for the other process")
}

fn send(socket: &OwnedFd, message: &Message, descriptors: &[i32]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let rights = [ControlMessage::ScmRights(descriptors)];
    let control = if descriptors.is_empty() {
        &[]
    } else {
        &rights[..]
    };
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Waits for a message, through signals: with `SO_RCVTIMEO` set, recvmsg(2) ends with EINTR even where
/// handlers restart system calls (signal(7)), and a signal is no reason to give up a hand-over.
fn await_readable(socket: &OwnedFd) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let limit = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], limit) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// One message with its descriptors, or `None` when the other end is closed.
fn receive(socket: &OwnedFd) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = nix::cmsg_space!([i32; MAX_DESCRIPTORS]);
    await_readable(socket)?;
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            for number in numbers {
                // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it
                #[expect(unsafe_code, reason = "nix hands received descriptors out as numbers")]
                descriptors.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
    }
    let length = received.bytes;
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((
        serde_json::from_slice(&bytes[..length])?,
        descriptors,
    )))
}
