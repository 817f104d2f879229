"""Chat templates that show tools to a model and write its calls, in the manner of the families that Lorikeet reads."""

from __future__ import annotations

HERMES = """\
{%- if tools %}{{- '<|system|>\\n' }}{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
{{- 'Call one by <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call>' }}{{- '<|end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' }}
{%- if message.role == 'tool' %}{{- '<tool_response>' + message.content + '</tool_response>' }}
{%- else %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

LLAMA3 = """\
{%- for tool in tools or [] %}{{- tool | tojson }}
{{- 'Answer with {"name": its name, "parameters": an object}.' }}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'ipython' or message.role == 'tool' %}{{- '<|ipython|>' + message.content }}
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}' }}
{%- else %}{{- message.role + ': ' + message.content }}{%- endif %}
{%- endfor %}"""

MISTRAL = """\
{%- if tools %}{{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls is defined %}{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{- raise_exception('ids have 9 characters') }}{%- endif %}
{{- call.function | tojson }}
{%- endfor %}{{- ']' }}
{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS]' + message.content + message.tool_call_id }}
{%- else %}{{- message.content }}{%- endif %}
{%- endfor %}"""

MISTRAL_ARGS = """\
{%- if tools %}{{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{- '[TOOL_RESULTS]' }}{%- endif %}{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '[TOOL_CALLS]' + call['function']['name'] + '[ARGS]' + call['function']['arguments'] }}
{%- endfor %}{%- endfor %}"""

# XML between the same tags as Hermes': no form that is read here.
XML = "{{ tools }}<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"

# The contents alone, so that an engine that echoes its prompt answers with them.
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"
