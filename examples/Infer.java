import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;
import java.util.Collections;

/** Queries the gateway: java Infer.java http://HOST:PORT [MODEL]. Needs nothing beyond Java 11. */
public class Infer {
    public static void main(String[] args) throws Exception {
        String model = args.length > 1 ? args[1] : "digits";
        String data = String.join(",", Collections.nCopies(400, "0.5"));
        String body = "{\"inputs\": [{\"name\": \"input\", \"datatype\": \"FP32\", \"shape\": [1, 1, 20, 20], \"data\": ["
            + data + "]}]}";
        HttpRequest request = HttpRequest.newBuilder(URI.create(args[0] + "/v2/models/" + model + "/infer"))
            .header("superserve-slo-ms", "500")
            .timeout(Duration.ofSeconds(5))
            .POST(HttpRequest.BodyPublishers.ofString(body))
            .build();
        HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
        System.out.println(response.statusCode() + " " + response.body());
        if (response.statusCode() != 200) {
            System.exit(1);
        }
    }
}
