{{/* The name of everything: the release's, with the chart's unless it is in there. */}}
{{- define "superserve.name" -}}
{{- if contains "superserve" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-superserve" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "superserve.selector" -}}
app.kubernetes.io/name: superserve
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end -}}

{{- define "superserve.labels" -}}
{{ include "superserve.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "superserve.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* Where clients and workers reach each router, as JSON; nothing for a single one, which has none to name. */}}
{{- define "superserve.routers" -}}
{{- $name := include "superserve.name" . -}}
{{- $found := list -}}
{{- $n := int .Values.router.replicas -}}
{{- range $i := until (ternary $n 0 (gt $n 1)) -}}
{{- $host := printf "%s-router-%d.%s-router.%s" $name $i $name $.Release.Namespace -}}
{{- $client := printf "tcp://%s:%d" $host (int $.Values.router.clientPort) -}}
{{- $worker := printf "tcp://%s:%d" $host (int $.Values.router.workerPort) -}}
{{- $found = append $found (dict "client" $client "worker" $worker) -}}
{{- end -}}
{{- dict "routers" $found | toJson -}}
{{- end -}}

{{/* The names of all routers' pods, as a list in JSON. */}}
{{- define "superserve.routerPods" -}}
{{- $name := include "superserve.name" . -}}
{{- $found := list -}}
{{- range $i := until (int .Values.router.replicas) -}}
{{- $found = append $found (printf "%s-router-%d" $name $i) -}}
{{- end -}}
{{- $found | toJson -}}
{{- end -}}

{{/* What the schema cannot say: values that need or exclude each other. */}}
{{- define "superserve.check" -}}
{{- if ne (len (compact (list .Values.supernet .Values.family .Values.emulate))) 1 -}}
{{- fail "supernet: expected it, family or emulate, one of them: --set supernet=digits, or --set emulate=cnn-8gpu-modelled" -}}
{{- end -}}
{{- if and .Values.emulate (or .Values.profile .Values.weights) -}}
{{- fail "profile, weights: expected neither with emulate" -}}
{{- end -}}
{{- if and .Values.family (empty .Values.profile) -}}
{{- fail "profile: expected one with family, of `profiles measure --family`" -}}
{{- end -}}
{{- if and .Values.family .Values.weights -}}
{{- fail "weights: expected none with family, whose models have their own" -}}
{{- end -}}
{{- if and .Values.emulate .Values.worker.gpus -}}
{{- fail "worker.gpus: expected 0 with emulate, which uses no device" -}}
{{- end -}}
{{- if eq (empty .Values.security) (empty .Values.keys.prefix) -}}
{{- fail "security: expected it or keys.prefix, and not both: `cluster keys` makes keys, and --set security=none lets everything that reaches the ports use them" -}}
{{- end -}}
{{- $workers := ternary .Values.worker.replicas .Values.autoscaling.min (eq .Values.autoscaling.engine "none") -}}
{{- if and (gt (int .Values.router.replicas) 1) (gt (int .Values.router.replicas) (int $workers)) -}}
{{- fail (printf "router.replicas: expected at most the %d worker(s) of worker.replicas, or of autoscaling.min: a router without a worker is never ready, and an upgrade waits for it" (int $workers)) -}}
{{- end -}}
{{- if gt (int .Values.autoscaling.min) (int .Values.autoscaling.max) -}}
{{- fail "autoscaling.min: expected at most autoscaling.max" -}}
{{- end -}}
{{- end -}}

{{/* Confined: not root, and nothing gained. */}}
{{- define "superserve.pod" -}}
automountServiceAccountToken: false
# A Service named superserve would set SUPERSERVE_* variables.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "superserve.container" -}}
image: {{ include "superserve.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* Half a minute without an answer restarts a role; two failures take it out of its Service. */}}
{{- define "superserve.probes" -}}
startupProbe:
  httpGet: {path: /live, port: metrics}
  periodSeconds: 2
  timeoutSeconds: 3
  failureThreshold: {{ .startupFailures }}
livenessProbe:
  httpGet: {path: /live, port: metrics}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /ready, port: metrics}
  periodSeconds: 2
  timeoutSeconds: 3
  failureThreshold: 2
{{- end -}}
