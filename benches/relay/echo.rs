//! The echo service: a process of its own, so that its CPU time is not the relay's nor the load's.
//!
//! One epoll loop a thread. All threads wait for the listener, and each accepted connection goes to the next
//! thread in turn: few connections spread evenly, and a relay is not measured by the luck of a hash.

use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv, send};
use socket2::{Domain, Protocol, Socket, Type};

use crate::namespace::Namespace;

/// A first message of exactly these bytes is answered with the peer's address as the service sees it.
pub(crate) const WHO: &[u8; 8] = b"?whoami\n";

/// What one read may take. Bulk is then measured in copies rather than in system calls.
const BUFFER: usize = 256 << 10;

/// The listener's token; connections use their descriptor.
const LISTENER: u64 = u64::MAX;

/// The running service; ends with the value.
pub(crate) struct Echo(Child);

impl Echo {
    /// Starts this program again as the service, in a namespace.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) fn start(
        namespace: &Namespace,
        address: SocketAddrV4,
        threads: usize,
    ) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let child = namespace
            .command(program)
            .arg("--echo")
            .arg(address.to_string())
            .arg("--service-threads")
            .arg(threads.to_string())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start the echo service")?;
        Ok(Self(child))
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // both fail only when the service is gone already
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Serves until killed.
///
/// # Errors
/// When it cannot listen or accept.
pub(crate) fn serve(address: SocketAddrV4, threads: usize) -> Result<()> {
    let listener = listen(address).with_context(|| format!("cannot listen on {address}"))?;
    let workers = (0..threads)
        .map(|_| Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC))
        .collect::<nix::Result<Vec<_>>>()
        .context("cannot make an epoll instance")?;
    let service = Service {
        listener,
        workers,
        turn: AtomicUsize::new(0),
        connections: (0..crate::descriptors()?)
            .map(|_| Mutex::default())
            .collect(),
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = service
            .workers
            .iter()
            .map(|epoll| scope.spawn(|| service.work(epoll)))
            .collect();
        running
            .into_iter()
            .try_for_each(|worker| match worker.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
    })
}

fn listen(address: SocketAddrV4) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    // accepted connections inherit it
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(65_535)?;
    Ok(socket.into())
}

struct Service {
    listener: TcpListener,
    workers: Vec<Epoll>,
    /// Whose turn the next connection is.
    turn: AtomicUsize,
    /// By descriptor. Only one worker waits for a connection, so the lock is never contended.
    connections: Vec<Mutex<Connection>>,
}

#[derive(Default)]
struct Connection {
    stream: Option<TcpStream>,
    /// Whether it has sent something already.
    known: bool,
    /// Bytes that the peer's window had no room for; while there are any, nothing more is read.
    unsent: Vec<u8>,
}

impl Service {
    fn work(&self, epoll: &Epoll) -> Result<()> {
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        epoll
            .add(&self.listener, EpollEvent::new(interest, LISTENER))
            .context("cannot wait for the listener")?;
        let mut events = [EpollEvent::empty(); 256];
        let mut buffer = vec![0; BUFFER];
        loop {
            let count = match epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                result => result.context("cannot wait for events")?,
            };
            for event in &events[..count] {
                if event.data() == LISTENER {
                    self.accept()?;
                    continue;
                }
                let mut connection = self.connection(event.data() as usize);
                let goes_on = if event.events().contains(EpollFlags::EPOLLOUT) {
                    connection.flush(epoll)
                } else {
                    connection.echo(epoll, &mut buffer)
                };
                // a reset is how the rows end their connections: whether all arrived is the load's to judge
                if goes_on != Ok(true) {
                    *connection = Connection::default();
                }
            }
        }
    }

    fn accept(&self) -> Result<()> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or_default()) {
                    Errno::EAGAIN => return Ok(()),
                    Errno::ECONNABORTED | Errno::EINTR => continue,
                    _ => return Err(error).context("cannot accept"),
                },
            };
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.workers.len();
            let descriptor = stream.as_raw_fd() as usize;
            let mut connection = self.connection(descriptor);
            let event = EpollEvent::new(EpollFlags::EPOLLIN, descriptor as u64);
            self.workers[turn]
                .add(&stream, event)
                .context("cannot wait for a connection")?;
            connection.stream = Some(stream);
        }
    }

    fn connection(&self, descriptor: usize) -> MutexGuard<'_, Connection> {
        self.connections[descriptor]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// Returns whether the connection goes on.
    fn echo(&mut self, epoll: &Epoll, buffer: &mut [u8]) -> nix::Result<bool> {
        let Some(stream) = &self.stream else {
            return Ok(false);
        };
        let count = match recv(stream.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Ok(false),
            Err(Errno::EAGAIN) => return Ok(true),
            result => result?,
        };
        if !self.known && buffer[..count] == WHO[..] {
            let peer = stream
                .peer_addr()
                .map_or_else(|error| error.to_string(), |peer| peer.to_string());
            send_now(stream, peer.as_bytes())?;
            return Ok(true);
        }
        self.known = true;
        let sent = send_now(stream, &buffer[..count])?;
        if sent < count {
            self.unsent.extend_from_slice(&buffer[sent..count]);
            wait_for(epoll, stream, EpollFlags::EPOLLOUT)?;
        }
        Ok(true)
    }

    /// Returns whether the connection goes on.
    fn flush(&mut self, epoll: &Epoll) -> nix::Result<bool> {
        let Some(stream) = &self.stream else {
            return Ok(false);
        };
        let sent = send_now(stream, &self.unsent)?;
        self.unsent.drain(..sent);
        if self.unsent.is_empty() {
            wait_for(epoll, stream, EpollFlags::EPOLLIN)?;
        }
        Ok(true)
    }
}

/// Sends what there is room for, perhaps nothing.
pub(crate) fn send_now(stream: &TcpStream, bytes: &[u8]) -> nix::Result<usize> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    match send(stream.as_raw_fd(), bytes, flags) {
        Err(Errno::EAGAIN) => Ok(0),
        result => result,
    }
}

fn wait_for(epoll: &Epoll, stream: &TcpStream, events: EpollFlags) -> nix::Result<()> {
    let mut event = EpollEvent::new(events, stream.as_raw_fd() as u64);
    epoll.modify(stream, &mut event)
}
