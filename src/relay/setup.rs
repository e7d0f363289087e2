//! From an accepted connection to a relayed pair: allowed proxy, header, client, spoofed connection,
//! surplus bytes.
//!
//! The usual case, header and first payload there already and a local service, runs through in one go
//! without a wait, a timer or an allocation; whatever has to wait goes on as a boxed future.

use std::cell::RefCell;
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{self, SocketAddr};
use std::pin::Pin;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, trace};

use super::client;
use super::copy::{First, Pair};
use super::counters::Refusal;
use super::header::{self, Decoded, Endpoints, HeaderError, Transport};
use super::report::{self, ConnectError, Subject};
use super::view::Reason;
use super::worker::Conn;
use crate::model::{ClientAddr, ProxyAddr, TargetAddr};
use crate::socket::{self, Spoof, Spoofed};

/// The rest of a set-up that has to wait; `None` when the connection is over.
pub(super) type Slow = Pin<Box<dyn Future<Output = Option<Pair>>>>;

/// What became of an accepted connection at first go.
pub(super) enum Begun {
    Ready(Pair),
    Slow(Slow),
    Over,
}

/// The target's side of a connection, begun.
struct Opened {
    target: TcpStream,
    first: First,
    connected: bool,
    began: Instant,
    to: TargetAddr,
}

/// What the bytes received so far lead to.
enum Verdict {
    Incomplete,
    Opened(Opened),
    Refused,
}

/// Does everything that needs no wait.
///
/// The first read comes before the socket is registered with the event loop: a fresh registration knows of
/// nothing to read, and a header that is there already would be waited for, with a timer and an allocation.
pub(super) fn begin(conn: &Conn, client: net::TcpStream) -> Begun {
    // a process that could open the socket's file was let in by its permissions
    let trusted = match conn.entry.proxy() {
        ProxyAddr::Inet(addr) => conn.settings().allow.allows(addr.ip()),
        ProxyAddr::Local(_) => true,
    };
    if !trusted {
        refuse(
            conn,
            Refusal::ProxyNotAllowed,
            "refused: the proxy is not on the allow list",
        );
        socket::reset_on_close(&client);
        return Begun::Over;
    }
    let mut buffer = conn.shared.buffer.borrow_mut();
    let received = match (&client).read(&mut buffer) {
        Ok(length @ 1..) => &buffer[..length],
        Err(error) if is_for_later(&error) => &[],
        Ok(_) | Err(_) => {
            ended_without_header(conn, &[]);
            return Begun::Over;
        }
    };
    let opened = match judge(conn, received) {
        Verdict::Opened(opened) => Some(opened),
        Verdict::Incomplete if conn.may_wait() => None,
        Verdict::Incomplete => {
            refuse(
                conn,
                Refusal::TooManyWaiting,
                "refused: too many connections wait for their PROXY header",
            );
            socket::reset_on_close(&client);
            return Begun::Over;
        }
        Verdict::Refused => {
            socket::reset_on_close(&client);
            return Begun::Over;
        }
    };
    let client = match TcpStream::from_std(client) {
        Ok(client) => client,
        Err(error) => {
            debug!(proxy.addr = %conn.entry.proxy(), %error, "cannot watch a connection");
            return Begun::Over;
        }
    };
    let Some(opened) = opened else {
        let received = received.to_vec();
        let waiting = Waiting::new(conn);
        return Begun::Slow(Box::pin(finish_header(waiting, client, received)));
    };
    conn.counters.header_wait.observe(Duration::ZERO);
    if opened.connected {
        return Begun::Ready(paired(conn, client, opened));
    }
    let conn = conn.clone();
    Begun::Slow(Box::pin(async move {
        finish_connect(&conn, client, opened).await
    }))
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// A place among the connections that wait for their header.
struct Waiting(Conn);

impl Waiting {
    fn new(conn: &Conn) -> Self {
        conn.counters.waiting.add(1);
        Self(conn.clone())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.counters.waiting.sub_one();
    }
}

/// Reads on until the header is there, is none, or takes too long.
async fn finish_header(waiting: Waiting, client: TcpStream, received: Vec<u8>) -> Option<Pair> {
    let conn = waiting.0.clone();
    let received = RefCell::new(received);
    let limit = conn.settings().header_timeout;
    let began = Instant::now();
    let outcome = timeout_at(began + limit, read_header(&conn, &client, &received)).await;
    drop(waiting);
    if conn.entry.client().is_some() {
        conn.counters.header_wait.observe(began.elapsed());
    }
    match outcome {
        Ok(Some(opened)) if opened.connected => Some(paired(&conn, client, opened)),
        Ok(Some(opened)) => finish_connect(&conn, client, opened).await,
        Ok(None) => {
            socket::reset_on_close(&client);
            None
        }
        Err(_elapsed) => {
            let message = report::header_timeout(&received.borrow(), limit);
            refuse(&conn, Refusal::HeaderTimeout, &message);
            socket::reset_on_close(&client);
            None
        }
    }
}

async fn read_header(
    conn: &Conn,
    client: &TcpStream,
    received: &RefCell<Vec<u8>>,
) -> Option<Opened> {
    loop {
        if client.readable().await.is_err() {
            return None;
        }
        let mut received = received.borrow_mut();
        let mut buffer = conn.shared.buffer.borrow_mut();
        // what came before goes in front, so that the decoder sees one piece; a header that is not
        // complete is far shorter than the buffer
        buffer[..received.len()].copy_from_slice(&received);
        let length = match client.try_read(&mut buffer[received.len()..]) {
            Ok(0) => {
                ended_without_header(conn, &received);
                return None;
            }
            Ok(more) => received.len() + more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => {
                ended_without_header(conn, &received);
                return None;
            }
        };
        match judge(conn, &buffer[..length]) {
            Verdict::Incomplete => {
                let known = received.len();
                received.extend_from_slice(&buffer[known..length]);
            }
            Verdict::Opened(opened) => return Some(opened),
            Verdict::Refused => return None,
        }
    }
}

/// Decodes what came and acts on it. Never waits.
fn judge(conn: &Conn, received: &[u8]) -> Verdict {
    if received.is_empty() {
        return Verdict::Incomplete;
    }
    let (client, surplus) = match header::decode(received) {
        Ok(Decoded::Incomplete) => return Verdict::Incomplete,
        // a client of the proxy's UDP side on a TCP connection: the proxy mixes up its own services
        Ok(Decoded::Complete { header, .. }) if header.transport == Transport::Datagram => {
            let message = "refused: the PROXY header announces datagrams (DGRAM), and this instance relays TCP";
            refuse(conn, Refusal::BadHeader, message);
            return Verdict::Refused;
        }
        Ok(Decoded::Complete { header, length }) => {
            let (client, asked) = match (header.endpoints, conn.entry.proxy()) {
                (
                    Endpoints::Proxied {
                        client,
                        destination,
                    },
                    _,
                ) => (client, Some(destination)),
                (Endpoints::Local, ProxyAddr::Inet(proxy)) => (ClientAddr::new(proxy), None),
                // nobody whom the service could be shown, and nothing to be said about every few seconds
                (Endpoints::Local, proxy @ ProxyAddr::Local(_)) => {
                    conn.counters.empty.add(1);
                    conn.entry.ends(Reason::Empty);
                    debug!(proxy.addr = %proxy, "no client in the header of a proxy on this host: a health check");
                    return Verdict::Refused;
                }
            };
            conn.entry.has_header(&header, client);
            ((client, asked), &received[length..])
        }
        Err(error) => {
            let kind = match error {
                HeaderError::NotProxy => Refusal::NoHeader,
                _ => Refusal::BadHeader,
            };
            let message = report::bad_header(error, received);
            refuse(conn, kind, &message);
            return Verdict::Refused;
        }
    };
    let (client, asked) = client;
    open(conn, client, asked, surplus).map_or(Verdict::Refused, Verdict::Opened)
}

/// Begins the spoofed connection and hands over the surplus if the service takes it at once.
fn open(
    conn: &Conn,
    client: ClientAddr,
    asked: Option<SocketAddr>,
    surplus: &[u8],
) -> Option<Opened> {
    let settings = conn.settings();
    let family = client.family();
    let began = Instant::now();
    let refused = |kind| {
        let message = report::refused_client(kind, family, &settings.named);
        refuse(conn, kind, &message);
        None
    };
    if let Some(kind) = client::refusal(client.ip()) {
        return refused(kind);
    }
    let to = match settings.target_for(client, asked, conn.entry.port()) {
        Ok(to) => to,
        Err(kind @ Refusal::DestinationRefused) => {
            refuse(conn, kind, &report::refused_destination(asked));
            return None;
        }
        Err(kind) => return refused(kind),
    };
    let spoofed = socket::spoofed_tcp(&Spoof {
        client,
        target: to,
        mark: settings.mark,
        port: settings.port,
    });
    let Spoofed {
        socket: target,
        port,
        port_given_up,
    } = match spoofed {
        Ok(spoofed) => spoofed,
        Err(error) => match ConnectError::spoof(error) {
            Ok(error) => {
                connect_failed(conn, to, &error);
                return None;
            }
            Err(kind) => return refused(kind),
        },
    };
    conn.entry.is_connecting(port);
    if port_given_up {
        conn.counters.ports_given_up.add(1);
        debug!(
            proxy.addr = %conn.entry.proxy(), client.addr = %client,
            "the client's port is taken: another one is used, the address kept"
        );
    }
    // a connection to a local service is complete when connect() returns, although it says EINPROGRESS
    let (first, connected) = if surplus.is_empty() {
        (First::default(), target.peer_addr().is_ok())
    } else {
        match (&target).write(surplus) {
            Ok(sent) => {
                conn.counters.bytes_to_target.add(sent as u64);
                (First::new(sent, &surplus[sent..]), true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                (First::new(0, surplus), false)
            }
            Err(error) => {
                let error = ConnectError::kernel("connect", error);
                connect_failed(conn, to, &error);
                return None;
            }
        }
    };
    let target = match TcpStream::from_std(target) {
        Ok(target) => target,
        Err(error) => {
            let error = ConnectError::kernel("watch the socket", error);
            connect_failed(conn, to, &error);
            return None;
        }
    };
    Some(Opened {
        target,
        first,
        connected,
        began,
        to,
    })
}

/// Waits until the service answers.
async fn finish_connect(conn: &Conn, client: TcpStream, opened: Opened) -> Option<Pair> {
    let limit = conn.settings().connect_timeout;
    if let Err(error) = connected_within(&opened.target, limit).await {
        connect_failed(conn, opened.to, &error);
        socket::reset_on_close(&client);
        return None;
    }
    Some(paired(conn, client, opened))
}

async fn connected_within(target: &TcpStream, limit: Duration) -> Result<(), ConnectError> {
    match timeout(limit, target.writable()).await {
        Err(_elapsed) => {
            // nobody is there to close it with
            socket::reset_on_close(target);
            Err(ConnectError::timed_out(limit))
        }
        Ok(Err(error)) => Err(ConnectError::kernel("wait for the connection", error)),
        Ok(Ok(())) => match target.take_error() {
            Ok(None) => Ok(()),
            Ok(Some(error)) | Err(error) => Err(ConnectError::kernel("connect", error)),
        },
    }
}

fn paired(conn: &Conn, client: TcpStream, opened: Opened) -> Pair {
    conn.counters.relayed.add(1);
    conn.counters.connect_time.observe(opened.began.elapsed());
    conn.entry.is_relaying();
    trace!(
        proxy.addr = %conn.entry.proxy(), client.addr = conn.entry.client().map(display),
        target.addr = %opened.to, "connected to the service"
    );
    let idle_timeout = conn.settings().idle_timeout;
    Pair::new(client, opened.target, opened.first, idle_timeout)
}

fn ended_without_header(conn: &Conn, received: &[u8]) {
    if received.is_empty() {
        conn.counters.empty.add(1);
        conn.entry.ends(Reason::Empty);
        debug!(proxy.addr = %conn.entry.proxy(), "closed by the proxy without a byte: a health check");
        return;
    }
    refuse(
        conn,
        Refusal::HeaderTruncated,
        "refused: the connection ended inside the PROXY header",
    );
}

fn refuse(conn: &Conn, kind: Refusal, message: &str) {
    conn.counters.refuse(kind);
    conn.entry.ends(Reason::Refused(kind));
    report::warn(conn, Subject::Refused(kind), &message);
}

fn connect_failed(conn: &Conn, to: TargetAddr, error: &ConnectError) {
    conn.counters.connect_failed(error.kind);
    conn.entry.ends(Reason::ConnectFailed(error.kind));
    let message = error.message(to, &conn.settings());
    report::warn(conn, Subject::ConnectFailed(error.kind), &message);
}
