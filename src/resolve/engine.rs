//! The container engine's API on its Unix socket: Docker's, which Podman serves as well.
//!
//! Owns: finding the socket, asking for a container's addresses, hearing of events. Must not know: instances.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::UnixStream;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::model::Family;

/// Where the socket is, as Docker's own programs are told.
const VARIABLE: &str = "DOCKER_HOST";
/// Where it is looked for otherwise.
const USUAL: [&str; 3] = [
    "/var/run/docker.sock",
    "/run/docker.sock",
    "/run/podman/podman.sock",
];
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest answer in bytes.
const MAX_ANSWER: usize = 4 << 20;

/// Why a container's address is not known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No engine is there.
    #[error(
        "no container engine: neither $DOCKER_HOST nor /var/run/docker.sock nor /run/podman/podman.sock is there"
    )]
    NoEngine,
    /// `$DOCKER_HOST` is something else than a Unix socket.
    #[error("$DOCKER_HOST is '{0}': only unix:///path is supported")]
    NotUnix(String),
    /// It does not answer.
    #[error("cannot ask the container engine at {}", path.display())]
    Unreachable {
        /// Its socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It has no such container, or says something else than an answer.
    #[error("the container engine says: {0}")]
    Refused(String),
    /// The container is there and has no address.
    #[error("{0}")]
    NoAddress(String),
}

/// An engine's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    path: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Container {
    #[serde(default)]
    state: State,
    #[serde(default)]
    host_config: HostConfig,
    #[serde(default)]
    network_settings: NetworkSettings,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct State {
    running: bool,
    status: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct HostConfig {
    network_mode: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct NetworkSettings {
    /// Null where there is none.
    networks: Option<BTreeMap<String, Endpoint>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Endpoint {
    #[serde(rename = "IPAddress")]
    v4: String,
    #[serde(rename = "GlobalIPv6Address")]
    v6: String,
}

impl Endpoint {
    fn addr(&self, family: Family) -> Option<IpAddr> {
        let text = match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        };
        text.parse().ok()
    }
}

#[derive(Debug, Deserialize)]
struct Complaint {
    message: String,
}

impl Engine {
    /// The engine that the environment names, else one that is there.
    ///
    /// # Errors
    /// When there is none, or the environment names one that is not on this host.
    pub fn find() -> Result<Self, Error> {
        match std::env::var(VARIABLE)
            .ok()
            .filter(|value| !value.is_empty())
        {
            Some(value) => match value.strip_prefix("unix://") {
                Some(path) => Ok(Self { path: path.into() }),
                None => Err(Error::NotUnix(value)),
            },
            None => USUAL
                .into_iter()
                .map(Path::new)
                .find(|path| path.exists())
                .map(|path| Self { path: path.into() })
                .ok_or(Error::NoEngine),
        }
    }

    /// A container's address of a family.
    ///
    /// # Errors
    /// When the engine does not answer, or the container has no such address.
    pub async fn address(
        &self,
        name: &str,
        network: Option<&str>,
        family: Family,
    ) -> Result<IpAddr, Error> {
        let bytes = timeout(PATIENCE, self.get(&format!("/containers/{name}/json")))
            .await
            .map_err(|_elapsed| self.unreachable(io::ErrorKind::TimedOut.into()))??;
        let container: Container = serde_json::from_slice(&bytes)
            .map_err(|error| Error::Refused(format!("something that is no container: {error}")))?;
        address_of(name, &container, network, family)
    }

    async fn get(&self, path: &str) -> Result<Bytes, Error> {
        let (response, connection) = self.ask(path).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| self.unreachable(io::Error::other(error)))?
            .to_bytes();
        connection.abort();
        if status == StatusCode::OK {
            return Ok(body);
        }
        let said = serde_json::from_slice::<Complaint>(&body)
            .map_or_else(|_| status.to_string(), |complaint| complaint.message);
        Err(Error::Refused(said))
    }

    async fn ask(&self, path: &str) -> Result<(Response<Incoming>, AbortHandle), Error> {
        let failed = |error: hyper::Error| self.unreachable(io::Error::other(error));
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|error| self.unreachable(error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(failed)?;
        let connection = tokio::spawn(async move {
            // an error is the answer's, too
            let _ = connection.await;
        })
        .abort_handle();
        let request = Request::get(path)
            .header(HOST, "localhost")
            .body(Empty::<Bytes>::new())
            .map_err(|error| self.unreachable(io::Error::other(error)))?;
        let response = sender.send_request(request).await.map_err(failed)?;
        Ok((response, connection))
    }

    /// What happens to containers and networks from now on.
    ///
    /// # Errors
    /// When the engine does not answer.
    pub async fn events(&self) -> Result<Events, Error> {
        // {"type":["container","network"]}
        let path = "/events?filters=%7B%22type%22%3A%5B%22container%22%2C%22network%22%5D%7D";
        let asked = timeout(PATIENCE, self.ask(path)).await;
        let (response, connection) =
            asked.map_err(|_elapsed| self.unreachable(io::ErrorKind::TimedOut.into()))??;
        if response.status() != StatusCode::OK {
            return Err(Error::Refused(response.status().to_string()));
        }
        Ok(Events {
            body: response.into_body(),
            connection,
            line: Vec::new(),
        })
    }

    fn unreachable(&self, source: io::Error) -> Error {
        Error::Unreachable {
            path: self.path.clone(),
            source,
        }
    }
}

fn address_of(
    name: &str,
    container: &Container,
    network: Option<&str>,
    family: Family,
) -> Result<IpAddr, Error> {
    let nothing = |why: String| Err(Error::NoAddress(why));
    if !container.state.running {
        let state = match container.state.status.as_str() {
            "" => "not running",
            state => state,
        };
        return nothing(format!("container {name} is {state}"));
    }
    if container.host_config.network_mode == "host" {
        return Ok(match family {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        });
    }
    let empty = BTreeMap::new();
    let networks = container
        .network_settings
        .networks
        .as_ref()
        .unwrap_or(&empty);
    let having: Vec<(&String, IpAddr)> = networks
        .iter()
        .filter(|(one, _)| network.is_none_or(|network| network == *one))
        .filter_map(|(one, endpoint)| Some((one, endpoint.addr(family)?)))
        .collect();
    match having.as_slice() {
        [(_, addr)] => Ok(*addr),
        [] => nothing(match network {
            Some(network) => {
                format!("container {name} has no {family} address in network {network}")
            }
            None => format!(
                "container {name} has no {family} address of its own (network mode {})",
                container.host_config.network_mode
            ),
        }),
        [(first, _), ..] => {
            let names: Vec<&str> = having.iter().map(|(one, _)| one.as_str()).collect();
            nothing(format!(
                "container {name} is in several networks ({}): say which, as docker:{name}@{first}",
                names.join(", ")
            ))
        }
    }
}

/// A stream of events. Dropping it ends it.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    connection: AbortHandle,
    line: Vec<u8>,
}

impl Drop for Events {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

#[derive(Debug, Deserialize)]
struct Event {
    /// Docker says it once more as `status`.
    #[serde(rename = "Action", default)]
    action: String,
}

impl Events {
    /// Waits for an event after which an address may be another; `None` at the stream's end. Cancel-safe: what
    /// was read of a line is kept.
    pub async fn next(&mut self) -> Option<()> {
        loop {
            let frame = self.body.frame().await?.ok()?;
            let Ok(bytes) = frame.into_data() else {
                continue;
            };
            self.line.extend_from_slice(&bytes);
            let mut matters = false;
            while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.line.drain(..=end).collect();
                matters |= is_about_addresses(&line);
            }
            if self.line.len() > MAX_ANSWER {
                return None;
            }
            if matters {
                return Some(());
            }
        }
    }
}

/// Health checks and `exec` come every few seconds and move nothing.
fn is_about_addresses(line: &[u8]) -> bool {
    match serde_json::from_slice::<Event>(line) {
        Ok(event) => !event.action.starts_with("exec") && !event.action.starts_with("health"),
        Err(_) => !line.trim_ascii().is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(json: &str, network: Option<&str>, family: Family) -> Result<String, String> {
        let container: Container = serde_json::from_str(json).unwrap();
        address_of("web", &container, network, family)
            .map(|addr| addr.to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn addresses_of_containers() {
        let one = r#"{"State":{"Running":true},"HostConfig":{"NetworkMode":"bridge"},
            "NetworkSettings":{"Networks":{"bridge":{"IPAddress":"172.17.0.2","GlobalIPv6Address":""}}}}"#;
        assert_eq!(address(one, None, Family::V4).unwrap(), "172.17.0.2");
        assert_eq!(
            address(one, None, Family::V6).unwrap_err(),
            "container web has no IPv6 address of its own (network mode bridge)"
        );
        assert_eq!(
            address(one, Some("front"), Family::V4).unwrap_err(),
            "container web has no IPv4 address in network front"
        );
        let two = r#"{"State":{"Running":true},"NetworkSettings":{"Networks":{
            "front":{"IPAddress":"172.18.0.2","GlobalIPv6Address":"fd00::2"},
            "back":{"IPAddress":"172.19.0.2","GlobalIPv6Address":""}}}}"#;
        assert_eq!(
            address(two, None, Family::V4).unwrap_err(),
            "container web is in several networks (back, front): say which, as docker:web@back"
        );
        assert_eq!(
            address(two, Some("back"), Family::V4).unwrap(),
            "172.19.0.2"
        );
        assert_eq!(address(two, None, Family::V6).unwrap(), "fd00::2");
        let host = r#"{"State":{"Running":true},"HostConfig":{"NetworkMode":"host"},
            "NetworkSettings":{"Networks":{"host":{"IPAddress":"","GlobalIPv6Address":""}}}}"#;
        assert_eq!(address(host, None, Family::V4).unwrap(), "127.0.0.1");
        assert_eq!(address(host, None, Family::V6).unwrap(), "::1");
        let stopped =
            r#"{"State":{"Running":false,"Status":"exited"},"NetworkSettings":{"Networks":null}}"#;
        assert_eq!(
            address(stopped, None, Family::V4).unwrap_err(),
            "container web is exited"
        );
    }

    #[test]
    fn events_that_matter() {
        assert!(is_about_addresses(
            br#"{"Type":"container","Action":"start"}"#
        ));
        assert!(is_about_addresses(
            br#"{"status":"died","Type":"container","Action":"died"}"#
        ));
        assert!(!is_about_addresses(
            br#"{"Type":"container","Action":"exec_create: sh"}"#
        ));
        assert!(!is_about_addresses(
            br#"{"Type":"container","Action":"health_status: healthy"}"#
        ));
        assert!(!is_about_addresses(b"\n"));
    }
}
