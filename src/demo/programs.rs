//! The programs of the demonstration: a service that says whom it sees, a proxy, a client.
//!
//! Owns: plain blocking sockets, one connection at a time. Must not know: namespaces; a thread is where
//! its caller was.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use crate::relay::header::{encode_v1, encode_v2};

/// How long a client tries, connects and waits for the service's word.
const PATIENCE: Duration = Duration::from_secs(3);

/// How a proxy announces its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sends {
    /// A PROXY header of version 1, as HAProxy's `send-proxy`.
    V1,
    /// A PROXY header of version 2, as HAProxy's `send-proxy-v2`.
    V2,
    /// Nothing: a plain forwarder.
    Nothing,
}

impl Sends {
    fn header(self, client: SocketAddr, destination: SocketAddr) -> Vec<u8> {
        match self {
            Self::V1 => encode_v1(client, destination),
            Self::V2 => encode_v2(client, destination),
            Self::Nothing => Vec::new(),
        }
    }
}

/// A listener on a port of every address of a family or, where the host has it, of both.
fn listen(port: u16, ipv6: bool) -> io::Result<Vec<TcpListener>> {
    let mut wildcards: Vec<SocketAddr> = vec![(Ipv4Addr::UNSPECIFIED, port).into()];
    if ipv6 {
        wildcards.push((Ipv6Addr::UNSPECIFIED, port).into());
    }
    wildcards
        .into_iter()
        .map(|wildcard| {
            let socket = Socket::new(Domain::for_address(wildcard), Type::STREAM, None)?;
            if wildcard.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            socket.bind(&wildcard.into())?;
            socket.listen(16)?;
            Ok(socket.into())
        })
        .collect()
}

/// Handles connections one by one on a thread per listener, for as long as the process lives.
fn serve(
    listeners: Vec<TcpListener>,
    handle: impl Fn(TcpStream, SocketAddr) -> io::Result<()> + Copy + Send + 'static,
) -> io::Result<()> {
    for listener in listeners {
        std::thread::Builder::new().spawn(move || {
            while let Ok((stream, peer)) = listener.accept() {
                // what one connection fails of is seen by its client, who gets no answer
                let _ = handle(stream, peer);
            }
        })?;
    }
    Ok(())
}

/// Starts a service that sends each client the address that it sees, and closes.
///
/// # Errors
/// When the port cannot be had.
pub fn start_service(port: u16, ipv6: bool) -> io::Result<()> {
    serve(listen(port, ipv6)?, |mut stream, peer| {
        write!(stream, "{peer}")
    })
}

/// Starts a proxy that passes connections on its port on to `upstream`, each behind a header.
///
/// # Errors
/// When the port cannot be had.
pub fn start_proxy(port: u16, ipv6: bool, upstream: SocketAddr, sends: Sends) -> io::Result<()> {
    serve(listen(port, ipv6)?, move |mut client, peer| {
        let mut service = TcpStream::connect_timeout(&upstream, PATIENCE)?;
        service.write_all(&sends.header(peer, client.local_addr()?))?;
        service.shutdown(Shutdown::Write)?;
        io::copy(&mut service, &mut client)?;
        Ok(())
    })
}

/// What a client found out.
#[derive(Debug)]
pub struct Answer {
    /// The client's own end.
    pub own: SocketAddr,
    /// What the service said it saw; `None` when the connection was closed without a word.
    pub seen: Option<SocketAddr>,
}

/// Connects to an address and asks whom the service sees.
///
/// # Errors
/// When there is no connection, or no end of it within a few seconds.
pub fn ask(address: SocketAddr) -> io::Result<Answer> {
    let end = Instant::now() + PATIENCE;
    let mut stream = loop {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            // a fresh interface has no carrier, and so no IPv6 route, for some milliseconds
            Err(error)
                if Instant::now() < end
                    && matches!(
                        error.kind(),
                        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable
                    ) =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            outcome => break outcome?,
        }
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    let own = stream.local_addr()?;
    let mut answer = String::new();
    let seen = match stream.read_to_string(&mut answer) {
        Ok(_) => answer.parse().ok(),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
        Err(error) => return Err(error),
    };
    Ok(Answer { own, seen })
}
