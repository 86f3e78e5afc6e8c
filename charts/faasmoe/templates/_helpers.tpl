{{- define "faasmoe.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "faasmoe.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "faasmoe.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "faasmoe.operatorName" -}}
{{- printf "%s-operator" (include "faasmoe.fullname" .) -}}
{{- end -}}

{{- define "faasmoe.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "faasmoe.operatorName" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name: missing, expected the name of an account as serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "faasmoe.selectorLabels" -}}
app.kubernetes.io/name: faasmoe-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "faasmoe.labels" -}}
{{ include "faasmoe.selectorLabels" . }}
app.kubernetes.io/component: operator
{{ include "faasmoe.releaseLabels" . }}
{{- end -}}

{{- define "faasmoe.gatewayName" -}}
{{- printf "%s-gateway" (include "faasmoe.fullname" .) -}}
{{- end -}}

{{- define "faasmoe.gatewaySelectorLabels" -}}
app.kubernetes.io/name: faasmoe-gateway
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "faasmoe.gatewayLabels" -}}
{{ include "faasmoe.gatewaySelectorLabels" . }}
app.kubernetes.io/component: gateway
{{ include "faasmoe.releaseLabels" . }}
{{- end -}}

{{- define "faasmoe.testLabels" -}}
app.kubernetes.io/name: faasmoe-test
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: test
{{- end -}}

{{- define "faasmoe.releaseLabels" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: faasmoe
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- /* The chart's labels and a user's; the chart's win, because selectors need them: dict "labels" "root". */ -}}
{{- define "faasmoe.mergedLabels" -}}
{{- merge (include "faasmoe.labels" .root | fromYaml) (default dict .labels) | toYaml -}}
{{- end -}}

{{- /* The full name of an image: dict "image" "field" "root". */ -}}
{{- define "faasmoe.image" -}}
{{- if not (kindIs "map" .image) -}}
{{- fail (printf "%s: got %v, expected registry, repository, tag and digest" .field .image) -}}
{{- end -}}
{{- if eq .image.tag "latest" -}}
{{- fail (printf "%s.tag: got latest, expected a version, or a digest in %s.digest" .field .field) -}}
{{- end -}}
{{- $registry := default .root.Values.global.imageRegistry .image.registry -}}
{{- $name := ternary (printf "%s/%s" $registry .image.repository) .image.repository (ne $registry "") -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{- /* Pull secrets as pods name them; in `global`, other charts also write plain names. */ -}}
{{- define "faasmoe.pullSecrets" -}}
{{- $secrets := list -}}
{{- range concat .Values.global.imagePullSecrets .Values.imagePullSecrets -}}
{{- $secrets = append $secrets (ternary (dict "name" .) . (kindIs "string" .)) -}}
{{- end -}}
{{- with $secrets -}}
{{- toYaml . -}}
{{- end -}}
{{- end -}}

{{- /* "true" if the platform assigns the ids of users and groups, else "false". */ -}}
{{- define "faasmoe.openshift" -}}
{{- if eq (toString .Values.openshift) "auto" -}}
{{- .Capabilities.APIVersions.Has "security.openshift.io/v1" -}}
{{- else -}}
{{- .Values.openshift -}}
{{- end -}}
{{- end -}}

{{- /* The security context of the chart's pods, without the ids that the platform assigns. */ -}}
{{- define "faasmoe.podSecurityContext" -}}
{{- $context := .Values.podSecurityContext -}}
{{- if eq (include "faasmoe.openshift" .) "true" -}}
{{- $context = omit $context "runAsUser" "runAsGroup" "fsGroup" -}}
{{- end -}}
{{- toYaml $context -}}
{{- end -}}

{{- define "faasmoe.rootKeySecret" -}}
{{- printf "%s-root-key" (include "faasmoe.fullname" .) -}}
{{- end -}}

{{- /* The name of the Lease is fixed in the operator and does not depend on the release. */ -}}
{{- define "faasmoe.lease" -}}
faasmoe-operator
{{- end -}}

{{- define "faasmoe.controlUrl" -}}
{{- printf "%s://%s.%s.svc:%v" (ternary "https" "http" .Values.tls.enabled) (include "faasmoe.operatorName" .) .Release.Namespace .Values.service.port -}}
{{- end -}}

{{- /* "true" if Secrets of another issuer are used, "false" if the operator issues certificates. */ -}}
{{- define "faasmoe.otherIssuer" -}}
{{- $names := .Values.tls.secretNames -}}
{{- $needed := list "operator" "models" -}}
{{- if .Values.gateway.enabled }}{{ $needed = append $needed "gateway" }}{{ end -}}
{{- $given := list -}}
{{- range $part, $name := $names }}{{ if $name }}{{ $given = append $given $part }}{{ end }}{{ end -}}
{{- if and $given (not .Values.tls.enabled) -}}
{{- fail (printf "tls.secretNames: got %s, expected none without tls.enabled" (join ", " $given)) -}}
{{- end -}}
{{- if $given -}}
{{- range $needed }}
{{- if not (has . $given) -}}
{{- fail (printf "tls.secretNames.%s: missing, expected the name of a Secret as there is one of %s" . (join ", " $given)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- not (empty $given) -}}
{{- end -}}

{{- define "faasmoe.gatewayTlsSecret" -}}
{{- default (printf "%s-tls" (include "faasmoe.gatewayName" .)) .Values.tls.secretNames.gateway -}}
{{- end -}}

{{- /* Scheme of probes of the operator; kubelets verify no certificate. */ -}}
{{- define "faasmoe.probeScheme" -}}
{{- ternary "HTTPS" "HTTP" .Values.tls.enabled -}}
{{- end -}}
