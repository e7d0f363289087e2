//! The asking side: finds the sockets of running processes, sends a request, waits for its answer.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::messages::{Failure, Request, Response};
use crate::runtime_dir::{self, RuntimeDir};

/// How long an answer may take: a reload waits for the firewall's lock, an upgrade for a whole start.
const PATIENCE: Duration = Duration::from_secs(120);
/// The longest answer, in bytes: some hundred thousand connections.
const MAX_ANSWER: u64 = 256 << 20;

/// The suffix of control sockets in the runtime directory.
pub const SUFFIX: &str = "sock";

/// Behind the name of a process that drains, its pid between the two. No instance's socket ends so.
const DRAINING: &str = ".draining";

/// The name of a process while it drains: another one may have its name by then.
pub fn draining(name: &str, pid: u32) -> String {
    format!("{name}.{pid}{DRAINING}")
}

/// Whether that is the name of a process that drains.
pub fn is_draining(name: &str) -> bool {
    name.ends_with(DRAINING)
}

/// The sockets of processes that drain and had this name.
///
/// # Errors
/// When the directory cannot be read.
pub fn draining_of(runtime: &RuntimeDir, name: &str) -> Result<Vec<PathBuf>, runtime_dir::Error> {
    let is_of = |found: &str| {
        let pid = found.strip_prefix(name)?.strip_prefix('.')?;
        Some(
            pid.strip_suffix(DRAINING)?
                .bytes()
                .all(|b| b.is_ascii_digit()),
        )
    };
    let files = runtime.files(SUFFIX)?.into_iter();
    let of = files.filter(|(found, _)| is_of(found) == Some(true));
    Ok(of.map(|(_, path)| path).collect())
}

/// Removes the sockets that draining processes left when they were killed: their names never come again.
pub fn remove_left(runtime: &RuntimeDir) {
    let files = runtime.files(SUFFIX).unwrap_or_default();
    for (_, path) in files.into_iter().filter(|(name, _)| is_draining(name)) {
        if let Err(error) = UnixStream::connect(&path)
            && error.kind() == io::ErrorKind::ConnectionRefused
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket, or what came over it, failed.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The process did not take the request: another version, or another user's.
    #[error("{} closed the connection without an answer: another user's process, or another version", path.display())]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// The process answered that it could not.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The runtime directory could not be read.
    #[error(transparent)]
    Directory(#[from] runtime_dir::Error),
}

/// A connection to a running process. Blocking.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the control socket at a path.
    ///
    /// # Errors
    /// [`io::ErrorKind::ConnectionRefused`] where the process is gone and left the file.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let fail = |operation| {
            move |source| Error::Io {
                operation,
                path: path.to_owned(),
                source,
            }
        };
        let stream = UnixStream::connect(path).map_err(fail("connect to"))?;
        for limit in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
            limit(&stream, Some(PATIENCE)).map_err(fail("set a time limit on"))?;
        }
        Ok(Self {
            path: path.to_owned(),
            stream: BufReader::new(stream),
        })
    }

    /// Sends a request and waits for its answer. Where the process closes the connection without one, the
    /// request goes once more to whoever has the socket by then: a process that was just succeeded by
    /// another leaves requests to it.
    ///
    /// # Errors
    /// [`Error::Failed`] where the process says so.
    pub fn ask(&mut self, request: &Request) -> Result<Value, Error> {
        match self.exchange(request) {
            Err(error) if error.is_closed() => {
                *self = Self::connect(&self.path)?;
                self.exchange(request)
            }
            outcome => outcome,
        }
    }

    /// Waits until the process has closed the connection.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn wait_closed(&mut self) -> Result<(), Error> {
        let mut rest = Vec::new();
        let outcome = (&mut self.stream).take(MAX_ANSWER).read_to_end(&mut rest);
        match outcome {
            Err(source) if source.kind() != io::ErrorKind::ConnectionReset => Err(Error::Io {
                operation: "wait for the end of",
                path: self.path.clone(),
                source,
            }),
            _ => Ok(()),
        }
    }

    fn exchange(&mut self, request: &Request) -> Result<Value, Error> {
        let path = &self.path;
        let fail = |operation| {
            move |source| Error::Io {
                operation,
                path: path.clone(),
                source,
            }
        };
        let mut line = serde_json::to_vec(request)
            .map_err(|error| fail("write a request to")(error.into()))?;
        line.push(b'\n');
        self.stream
            .get_mut()
            .write_all(&line)
            .map_err(fail("write to"))?;
        let mut answer = Vec::new();
        (&mut self.stream)
            .take(MAX_ANSWER)
            .read_until(b'\n', &mut answer)
            .map_err(fail("read from"))?;
        if answer.last() != Some(&b'\n') {
            return Err(Error::Closed { path: path.clone() });
        }
        match serde_json::from_slice(&answer) {
            Ok(Response::Ok(value)) => Ok(value),
            Ok(Response::Error(failure)) => Err(failure.into()),
            Err(error) => Err(fail("understand the answer from")(error.into())),
        }
    }
}

impl Error {
    /// Whether the other end closed the connection before it answered.
    fn is_closed(&self) -> bool {
        match self {
            Self::Closed { .. } => true,
            Self::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
            ),
            Self::Failed(_) | Self::Directory(_) => false,
        }
    }
}

/// A control socket that somebody answers.
#[derive(Debug)]
pub struct Found {
    /// What the socket is named by: an instance, or all of them.
    pub name: String,
    /// The connection.
    pub client: Client,
}

/// Connects to every running process of this runtime directory and network namespace, by name.
/// Files that processes left behind are passed over.
///
/// # Errors
/// When the directory cannot be read, or a process cannot be connected to.
pub fn find(runtime: &RuntimeDir) -> Result<Vec<Found>, Error> {
    let mut found = Vec::new();
    for (name, path) in runtime.files(SUFFIX)? {
        match Client::connect(&path) {
            Ok(client) => found.push(Found { name, client }),
            Err(Error::Io { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                ) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}
