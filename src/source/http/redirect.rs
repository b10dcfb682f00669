//! Where a redirect may lead, and what a request still carries when it gets there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use url::Host;

use super::*;

/// Most redirects that one request follows.
pub const MAX_REDIRECTS: usize = 10;
/// Longest Location that is followed, in bytes: signed URLs have 2 to 4 KiB.
pub const MAX_LOCATION_BYTES: usize = 16 * 1024;

/// The headers that may go to another origin.
pub(super) fn without_sensitive(headers: HeaderMap) -> HeaderMap {
    let always = [header::AUTHORIZATION, header::PROXY_AUTHORIZATION, header::COOKIE];
    let public = headers.iter().filter(|(name, value)| !value.is_sensitive() && !always.contains(*name));
    public.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// Where the Location of an answer from `at` leads, if it is [`permitted`].
pub(super) fn redirect_target(began_at: &Url, at: &Url, location: &HeaderValue, what: &str) -> Result<Url, Error> {
    let refuse = |why| Err(Error::Redirect { what: what.to_owned(), host: authority(at), why });
    if location.len() > MAX_LOCATION_BYTES {
        return refuse("the Location is longer than 16 KiB");
    }
    match location.to_str() {
        Ok(location) => permitted(began_at, at, location, what),
        Err(_) => refuse("the Location is not a URL"),
    }
}

/// Where the text of a server at `at` leads, if it may lead there: not from https to http, and not to this machine or
/// a metadata service unless the user asked for one to begin with.
pub(in crate::source) fn permitted(began_at: &Url, at: &Url, text: &str, what: &str) -> Result<Url, Error> {
    let refuse = |host: String, why| Err(Error::Redirect { what: what.to_owned(), host, why });
    let Ok(mut target) = at.join(text) else {
        return refuse(authority(at), "the address is not a URL");
    };
    target.set_fragment(None);
    let host = authority(&target);
    if !matches!(target.scheme(), "http" | "https") || target.host().is_none() {
        return refuse(host, "it is not an HTTP address");
    }
    if !target.username().is_empty() || target.password().is_some() {
        return refuse(host, "it has a user name in it");
    }
    if at.scheme() == "https" && target.scheme() == "http" {
        return refuse(host, "it leads from https to http");
    }
    for place in [Place::LinkLocal, Place::Loopback] {
        if place.has(&target) && !place.has(began_at) {
            return refuse(host, place.why());
        }
    }
    Ok(target)
}

/// Places that a server out there must not make us ask for it.
#[derive(Clone, Copy)]
enum Place {
    /// Link-local addresses and the clouds' metadata services.
    LinkLocal,
    /// This machine.
    Loopback,
}

impl Place {
    fn why(self) -> &'static str {
        match self {
            Place::LinkLocal => "it leads to a link-local or metadata address",
            Place::Loopback => "it leads to this machine",
        }
    }

    fn has(self, url: &Url) -> bool {
        match url.host() {
            None => false,
            Some(Host::Ipv4(ip)) => self.has_v4(ip),
            Some(Host::Ipv6(ip)) => self.has_v6(ip),
            Some(Host::Domain(name)) => {
                let name = name.trim_end_matches('.').to_ascii_lowercase();
                match self {
                    Place::LinkLocal => name == "metadata.google.internal" || name == "metadata",
                    Place::Loopback => name == "localhost" || name.ends_with(".localhost"),
                }
            }
        }
    }

    fn has_v4(self, ip: Ipv4Addr) -> bool {
        match self {
            // The last two are Alibaba's and Azure's.
            Place::LinkLocal => ip.is_link_local() || [[100, 100, 100, 200], [168, 63, 129, 16]].contains(&ip.octets()),
            Place::Loopback => ip.is_loopback() || ip.is_unspecified(),
        }
    }

    fn has_v6(self, ip: Ipv6Addr) -> bool {
        // ::ffff:a.b.c.d, ::a.b.c.d and 64:ff9b::a.b.c.d reach an IPv4 address.
        let segments = ip.segments();
        let embedded = match segments {
            [0, 0, 0, 0, 0, 0xffff | 0, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some((high, low)),
            _ => None,
        };
        let v4 = embedded.map(|(high, low)| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
        let itself = match self {
            Place::LinkLocal => ip.is_unicast_link_local() || segments == [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254],
            Place::Loopback => IpAddr::V6(ip).is_loopback() || ip.is_unspecified(),
        };
        itself || v4.is_some_and(|v4| self.has_v4(v4))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::tests::{answer, client, secret_request, server, url};
    use super::*;

    #[test]
    fn redirects_lead_only_to_permitted_places() {
        let from = url("https://hub.example/model");
        for bad in [
            "http://hub.example/model",
            "https://user@cdn.example/x",
            "https://user:secret@cdn.example/x",
            "https://169.254.169.254/latest",
            "https://0xa9fea9fe/",
            "https://2852039166/",
            "https://0251.0376.0251.0376/",
            "https://[::ffff:169.254.169.254]/",
            "https://[64:ff9b::a9fe:a9fe]/",
            "https://[fe80::1]/",
            "https://[fd00:ec2::254]/",
            "https://metadata.google.internal./",
            "https://100.100.100.200/",
            "https://127.0.0.1/",
            "https://localhost/",
            "https://0.0.0.0/",
            "https://[::1]/",
            "https://[::ffff:127.0.0.1]/",
            "ftp://hub.example/",
            "file:///etc/passwd",
            "javascript:alert(1)",
            "https://",
        ] {
            let refused = permitted(&from, &from, bad, "x").expect_err(bad);
            assert!(matches!(refused, Error::Redirect { .. }), "{refused}");
            assert!(!refused.to_string().contains("secret"), "{refused}");
        }
        for good in ["/other", "model2", "https://cdn.example:8443/x?sig=1", "//cdn.example/x", "https://10.0.0.7/x"] {
            permitted(&from, &from, good, "x").unwrap();
        }
        let (local, metadata) = (url("http://127.0.0.1:8080/"), url("http://169.254.169.254/"));
        permitted(&local, &local, "http://localhost:9090/", "x").unwrap();
        permitted(&metadata, &metadata, "/latest", "x").unwrap();
        assert!(permitted(&local, &local, "http://169.254.169.254/", "x").is_err());
    }

    #[tokio::test]
    async fn a_credential_goes_to_its_origin_only_and_does_not_come_back() {
        // a/ -> a/again -> b/ -> a/back -> 200
        let back = Arc::new(Mutex::new(String::new()));
        let to = back.clone();
        let (b, b_heads) = server(move |_| answer(302, &format!("Location: {}\r\n", to.lock().unwrap()), "")).await;
        let (a, a_heads) = server(move |head| match head.split(' ').nth(1).unwrap() {
            "/" => answer(307, "Location: /again\r\n", ""),
            "/again" => answer(302, &format!("Location: http://127.0.0.1:{b}/\r\n"), ""),
            _ => answer(200, "", "done"),
        })
        .await;
        *back.lock().unwrap() = format!("http://127.0.0.1:{a}/back");

        let response = client().send(secret_request(a)).await.unwrap();
        assert_eq!(response.url().path(), "/back");
        assert_eq!(response.bytes(100).await.unwrap(), b"done");
        let (a_heads, b_heads) = (a_heads.lock().unwrap().clone(), b_heads.lock().unwrap().clone());
        let secret: Vec<_> = a_heads.iter().map(|head| head.matches("canary").count()).collect();
        assert_eq!(secret, [2, 2, 0], "sent to its origin, and not again after another one: {a_heads:?}");
        assert!(!b_heads[0].contains("canary") && b_heads[0].contains("for all"), "{b_heads:?}");
    }

    #[tokio::test]
    async fn a_redirect_off_the_origin_can_be_read_and_not_followed() {
        let (port, heads) = server(|head| match head.split(' ').nth(1).unwrap() {
            "/" => answer(307, "Location: /moved\r\n", ""),
            _ => answer(302, "X-Linked-Size: 7\r\nLocation: http://127.0.0.2:1/signed?sig=1\r\n", ""),
        })
        .await;
        let request = Request { follow: Follow::SameOrigin, ..secret_request(port) };
        let response = client().send(request).await.unwrap();
        assert_eq!(response.header("x-linked-size"), Some("7"));
        assert_eq!(response.redirect().unwrap().as_str(), "http://127.0.0.2:1/signed?sig=1");
        assert_eq!(heads.lock().unwrap().len(), 2, "the one on the origin is followed");
    }

    #[tokio::test]
    async fn eleven_redirects_are_too_many() {
        let (port, heads) = server(|_| answer(302, "Location: /\r\n", "")).await;
        let error = client().send(secret_request(port)).await.err().unwrap();
        assert!(matches!(error, Error::Redirect { .. }), "{error}");
        assert_eq!(heads.lock().unwrap().len(), MAX_REDIRECTS + 1);
    }
}
