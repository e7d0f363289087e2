//! What is printed for programs that are not loaded here, read by a parser of its language: the right values
//! stand in the right places, whatever the instance is called.

use serde_json::Value;
use yaml_rust2::{Yaml, YamlLoader};

use super::printed;
use crate::support::net::Host;

/// Names that YAML or TOML would take for something else without quotes, and one that is nothing special.
const NAMES: [&str; 6] = ["ssh", "echo.1", "2222", "true", "1e3", "null"];

/// A host where every name is an instance, with its port.
fn host() -> Host {
    let host = Host::new("wks01");
    host.write("etc/pathways.conf", "123\n");
    let lines = NAMES
        .iter()
        .zip(7000..)
        .map(|(name, port)| format!("{name}\t123\t[fd00::1]:{port}\t127.0.0.1\t22\t::1\n"));
    host.write("etc/instances.tsv", lines.collect::<String>());
    host
}

/// Each instance's name, port and snippet.
fn snippets(kind: &str) -> Vec<(&'static str, u16, String)> {
    let host = host();
    let all = NAMES.into_iter().zip(7000..);
    all.map(|(name, port)| {
        let text = printed(&host, &format!("edge-config {name} {kind}"));
        (name, port, text)
    })
    .collect()
}

fn yaml(text: &str) -> Yaml {
    let documents = YamlLoader::load_from_str(text);
    documents
        .unwrap_or_else(|error| panic!("{error}\n{text}"))
        .remove(0)
}

#[test]
fn envoy() {
    for (name, port, text) in snippets("envoy") {
        let resources = &yaml(&text)["static_resources"];
        let (listener, cluster) = (&resources["listeners"][0], &resources["clusters"][0]);
        assert_eq!(listener["name"].as_str(), Some(name), "{text}");
        let public = &listener["address"]["socket_address"];
        assert_eq!(public["port_value"].as_i64(), Some(22), "{text}");
        assert_eq!(public["address"].as_str(), Some("::"), "{text}");
        assert_eq!(public["ipv4_compat"].as_bool(), Some(true), "{text}");
        let filter = &listener["filter_chains"][0]["filters"][0]["typed_config"];
        assert_eq!(
            filter["cluster"].as_str(),
            cluster["name"].as_str(),
            "{text}"
        );
        assert_eq!(cluster["name"].as_str(), Some(name), "{text}");
        let transport = &cluster["transport_socket"]["typed_config"];
        assert_eq!(
            transport["config"]["version"].as_str(),
            Some("V2"),
            "{text}"
        );
        let raw = transport["transport_socket"]["typed_config"]["@type"].as_str();
        assert!(
            raw.is_some_and(|kind| kind.ends_with(".RawBuffer")),
            "{text}"
        );
        let assignment = &cluster["load_assignment"];
        assert_eq!(assignment["cluster_name"].as_str(), Some(name), "{text}");
        let relay =
            &assignment["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"];
        assert_eq!(relay["address"].as_str(), Some("fd00::1"), "{text}");
        assert_eq!(relay["port_value"].as_i64(), Some(port.into()), "{text}");
    }
}

#[test]
fn traefik() {
    for (name, port, text) in snippets("traefik") {
        let tcp = &yaml(&text)["tcp"];
        let router = &tcp["routers"][name];
        assert_eq!(router["rule"].as_str(), Some("HostSNI(`*`)"), "{text}");
        assert_eq!(router["entryPoints"][0].as_str(), Some(name), "{text}");
        let balancer = &tcp["services"][router["service"].as_str().expect(name)]["loadBalancer"];
        let address = balancer["servers"][0]["address"].as_str();
        assert_eq!(
            address,
            Some(format!("[fd00::1]:{port}").as_str()),
            "{text}"
        );
        let transport = balancer["serversTransport"].as_str().expect(name);
        let header = &tcp["serversTransports"][transport]["proxyProtocol"];
        assert_eq!(header["version"].as_i64(), Some(2), "{text}");
        // the static half is in a comment
        let entry = text
            .lines()
            .find_map(|line| line.strip_prefix("#   entryPoints"));
        let entry = yaml(&format!("entryPoints{}", entry.expect("the entry point")));
        assert_eq!(
            entry["entryPoints"][name]["address"].as_str(),
            Some(":22"),
            "{text}"
        );
    }
}

#[test]
fn caddy() {
    for (name, port, text) in snippets("caddy") {
        let lines = text.lines().filter(|line| !line.starts_with("//"));
        let json: Value = serde_json::from_str(&lines.collect::<String>()).expect(name);
        let server = &json["apps"]["layer4"]["servers"][name];
        assert_eq!(server["listen"][0], "tcp/:22", "{text}");
        let proxy = &server["routes"][0]["handle"][0];
        assert_eq!(proxy["handler"], "proxy", "{text}");
        assert_eq!(proxy["proxy_protocol"], "v2", "{text}");
        assert_eq!(
            proxy["upstreams"][0]["dial"][0],
            format!("tcp/[fd00::1]:{port}"),
            "{text}"
        );
    }
}

#[test]
fn frp() {
    for (name, port, text) in snippets("frp") {
        let file: toml::Table = text
            .parse()
            .unwrap_or_else(|error| panic!("{error}\n{text}"));
        let proxy = &file["proxies"][0];
        assert_eq!(proxy["name"].as_str(), Some(name), "{text}");
        assert_eq!(proxy["type"].as_str(), Some("tcp"), "{text}");
        assert_eq!(proxy["localIP"].as_str(), Some("fd00::1"), "{text}");
        assert_eq!(proxy["localPort"].as_integer(), Some(port.into()), "{text}");
        assert_eq!(proxy["remotePort"].as_integer(), Some(22), "{text}");
        let version = proxy["transport"]["proxyProtocolVersion"].as_str();
        assert_eq!(version, Some("v2"), "{text}");
    }
}

/// The attributes of the resource of this type, as JSON; references to others as `${…}`.
fn terraform(text: &str, resource: &str) -> Value {
    let body: Value = hcl::from_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let all = body["resource"][resource].as_object().cloned();
    let all = all.unwrap_or_else(|| panic!("no {resource}\n{text}"));
    let (name, attributes) = all.into_iter().next().expect("a resource");
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    assert!(
        name.chars().all(word) && !name.starts_with(|c: char| c.is_ascii_digit()),
        "{name}"
    );
    attributes
}

#[test]
fn aws_nlb() {
    for (_, port, text) in snippets("aws-nlb") {
        let group = terraform(&text, "aws_lb_target_group");
        assert_eq!(group["proxy_protocol_v2"], true, "{text}");
        assert_eq!(group["preserve_client_ip"], false, "{text}");
        assert_eq!(group["ip_address_type"], "ipv6", "{text}");
        assert_eq!(group["port"], port, "{text}");
        let attached = terraform(&text, "aws_lb_target_group_attachment");
        assert_eq!(attached["target_id"], "fd00::1", "{text}");
        assert_eq!(attached["port"], port, "{text}");
        let listener = terraform(&text, "aws_lb_listener");
        assert_eq!(listener["port"], 22, "{text}");
        let action = &listener["default_action"];
        assert_eq!(
            action["target_group_arn"], attached["target_group_arn"],
            "{text}"
        );
    }
}

#[test]
fn spectrum() {
    for (_, port, text) in snippets("spectrum") {
        let application = terraform(&text, "cloudflare_spectrum_application");
        assert_eq!(application["protocol"], "tcp/22", "{text}");
        assert_eq!(application["proxy_protocol"], "v2", "{text}");
        assert_eq!(
            application["origin_direct"][0],
            format!("tcp://[fd00::1]:{port}"),
            "{text}"
        );
        assert_eq!(application["dns"]["type"], "CNAME", "{text}");
    }
}
